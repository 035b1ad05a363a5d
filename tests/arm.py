"""The kernels on a 64-bit Arm: their tests, and 20 tokens of stories260K that must be those of this machine.

    python tests/arm.py --python 'COMMAND' [arguments of pytest]

COMMAND runs a Python on a board, or an emulated one (qemu-aarch64 -cpu cortex-a76 or cortex-a72), that sees this folder
and has edgellm's dependencies and pytest. All instruction sets that its CPU has are tested: NEON, and where it is there
the dot product. Emulation takes minutes; -k, as in `-k "test_kernels and q4"`, runs a part.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("test_isa", "test_image", "test_kernels", "test_rows", "test_attention", "test_bits")
RUNNABLE = "import json; from edgellm import isa; print(json.dumps([isa.cpu()[0], isa.runnable()]))"
TOKENS = """
import json
from edgellm.api import Model
with Model("models/stories260k.edge", backend="cpu") as model:
    print(json.dumps(model.generate("Once upon a time", max_tokens=20, temperature=0).ids))
"""


def run(python: list[str], *arguments: str, capture: bool = True, **environment: str) -> str:
    """What a Python prints, if that is captured. Ends this program where it fails."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*python, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, text=True,
        stdout=subprocess.PIPE if capture else None,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{shlex.join([*python, *arguments[:2]])[:100]} ended with exit code {done.returncode}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the command that runs a Python on Arm", metavar="COMMAND")
    options, pytest = parser.parse_known_args()
    python = shlex.split(options.python)
    machine, isas = json.loads(run(python, "-c", RUNNABLE))
    if machine != "aarch64":
        sys.exit(f"{options.python!r} runs on {machine}; expected a Python on aarch64")
    expected = json.loads(run([sys.executable], "-c", TOKENS))
    for isa in isas[:-1]:  # the last one, generic, is not Arm's
        found = json.loads(run(python, "-c", TOKENS, EDGELLM_ISA=isa))
        if found != expected:
            sys.exit(f"{isa}: tokens {found}; here they are {expected}")
        print(f"{isa}: the same 20 tokens as here", flush=True)
    files = [str(Path("tests", f"{name}.py")) for name in TESTS]
    run(python, "-m", "pytest", "-p", "no:cacheprovider", *files, *pytest, capture=False)


if __name__ == "__main__":
    main()
