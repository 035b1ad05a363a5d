"""From a process's start to its end: the import, the command line's help, one token. Medians of 7, and peak memory.

    python benchmarks/startup.py [--json]

Each case runs once uncounted, which compiles kernels and brings files into memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import median
from typing import Any

import machine

RUNS = 7
TIMEOUT = 300.0


CASES = {
    "python -c pass": ["-c", "pass"],
    "import edgellm": ["-c", "import edgellm"],
    "edgellm --help": ["-m", "edgellm", "--help"],
    "one token, stories260k": ["-m", "edgellm", "generate", "Once", "-m", "stories260k", "-n", "1"],
    "one token, smollm2": ["-m", "edgellm", "generate", "Once", "-m", "smollm2", "-n", "1", "--ctx", "2048"],
}


def measured(arguments: list[str]) -> dict[str, Any]:
    """{"s": [...], "MB": [...]} of the counted runs."""
    runs = [machine.run([sys.executable, *arguments], TIMEOUT) for _ in range(RUNS + 1)][1:]
    return {"s": [run.seconds for run in runs], "MB": [run.peak_mb for run in runs]}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Seconds and peak memory of short runs of edgellm.")
    parser.add_argument("--json", action="store_true", help="print JSON, as soon as all is measured")
    options = parser.parse_args(arguments)
    found = {}
    for name, case in CASES.items():
        found[name] = measured(case)
        if not options.json:
            print(line(name, found[name]), flush=True)
    if options.json:
        print(json.dumps({"machine": machine.description(), "cases": found}, indent=1))


def line(name: str, found: dict[str, Any]) -> str:
    seconds, megabytes = found["s"], found["MB"]
    return (
        f"{name:<28}{median(seconds):.3f} s  [{min(seconds):.3f}-{max(seconds):.3f}]  {median(megabytes):>5.0f} MB peak"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
