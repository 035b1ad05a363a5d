"""The other runtimes: where their programs are, how they are called, and what their output says."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine

FLASH = {"fa 0": "0", "fa 1": "1"}
"""llama.cpp's flash attention is faster for some figures and slower for others; each figure is the better one's."""
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-completion", "llama-quantize")
PACKAGES = {"xllamacpp": "xllamacpp", "OpenVINO GenAI": "openvino-genai"}


class OutputError(Exception):
    """A program's output is not what was expected."""


@dataclass(frozen=True)
class Llama:
    """llama.cpp's programs, in one folder."""

    folder: Path

    @property
    def name(self) -> str:
        """What tells this build from others: CMake puts programs into bin/."""
        return self.folder.parent.name if self.folder.name == "bin" else self.folder.name

    def program(self, name: str) -> str:
        return str(self.folder / name)

    def lacks(self, name: str) -> str | None:
        """Why a program cannot be run; None if it can."""
        return None if os.access(self.folder / name, os.X_OK) else f"there is no {name} in {self.folder.name}/"

    def build(self) -> str:
        """The version and commit, as a program says them."""
        finished = machine.run([self.program("llama-bench"), "--version"], 30)
        found = re.search(r"version: (.+)", finished.stdout + finished.stderr)
        return found[1].strip() if found else "unknown"

    def bench(self, model: Path, threads: int, flash: str, repeats: int, *test: str) -> list[str]:
        """The command of llama-bench for one test, such as "-p", "0", "-n", "128"."""
        return [
            self.program("llama-bench"), "-m", str(model), "-t", str(threads), "-fa", flash, "-r", str(repeats),
            "-o", "json", *test,
        ]  # fmt: skip

    def batched(self, model: Path, threads: int, flash: str, sequences: int, prompt: int, tokens: int) -> list[str]:
        flash = {"0": "off", "1": "on"}[flash]
        context = sequences * (prompt + tokens)
        return [
            self.program("llama-batched-bench"), "-m", str(model), "-t", str(threads), "-fa", flash,
            "-c", str(context), "-b", "2048", "-ub", "512", "-npp", str(prompt), "-ntg", str(tokens),
            "-npl", str(sequences), "--output-format", "jsonl",
        ]  # fmt: skip

    def first_token(self, model: Path, threads: int, flash: str, context: int, prompt: str) -> list[str]:
        flash = {"0": "off", "1": "on"}[flash]
        return [
            self.program("llama-completion"), "-m", str(model), "-t", str(threads), "-fa", flash, "-c", str(context),
            "-n", "1", "--no-warmup", "-no-cnv", "-p", prompt,
        ]  # fmt: skip

    def quantize(self, source: Path, target: Path, format: str) -> None:
        """Make a file of another format, atomically; raises ProcessError."""
        part = target.with_suffix(".part")
        command = [self.program("llama-quantize"), "--allow-requantize", str(source), str(part), format]
        machine.run(command, 600)
        part.replace(target)


def find_llama(given: str | None) -> Llama | None:
    """llama.cpp beside the llama-bench that was given, or that LLAMA_BENCH names, or that is on PATH.

    Raises FileNotFoundError for one that was named and is not there.
    """
    named = given or os.environ.get("LLAMA_BENCH")
    path = Path(named).expanduser() if named else None
    if path is None:
        found = shutil.which("llama-bench")
        return Llama(Path(found).resolve().parent) if found else None
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise FileNotFoundError(f"{path} is no program; expected the path of llama-bench")
    return Llama(path.absolute().parent)


def bench_rate(output: str) -> float:
    """The median tokens per second of the one test in llama-bench's JSON."""
    try:
        (test,) = json.loads(output)
        return float(median(float(rate) for rate in test["samples_ts"]))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"llama-bench wrote {_short(output)}; expected JSON of one test with samples_ts") from error


def batched_rate(output: str) -> float:
    """Tokens per second of all sequences together, in llama-batched-bench's JSON lines of one test."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    try:
        (line,) = lines
        return float(json.loads(line)["speed_tg"])
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"llama-batched-bench wrote {_short(output)}; expected one line with speed_tg") from error


def own_rate(output: str) -> float:
    """The figure that benchmarks/sample.py printed."""
    return float(_last(output, "sample.py")["tokens_per_second"])


def edgellm_rate(output: str) -> float:
    """The median of the one test in the JSON of `edgellm bench`."""
    (test,) = _last(output, "edgellm bench")["tests"]
    return float(test["median"])


def _last(output: str, program: str) -> dict[str, Any]:
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise OutputError(f"{program} wrote {_short(output)}; expected a line of JSON") from error
    return dict(found)


def _short(output: str) -> str:
    return repr(output.strip()[:200])
