"""The machine and the processes on it: what it is, what runs on it, and what one process takes of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def description() -> dict[str, str | int]:
    """The CPU's name, the cores that this process may use, the kernel, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The model's name, with the numbers that tell apart what a cloud gives one name."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    if "model name" in facts:
        numbers = f" (family {facts['cpu family']} model {facts['model']})" if "cpu family" in facts else ""
        return facts["model name"] + numbers
    with suppress(OSError):
        return Path("/proc/device-tree/model").read_text().strip("\0\n")
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """The last commit that changed a folder, with "-changed" where it was changed since; None outside git."""
    git = ["git", "-C", str(folder)]
    with suppress(OSError, subprocess.SubprocessError):
        last, changes = (
            subprocess.run([*git, *words, "--", "."], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["log", "-1", "--format=%h", "--abbrev=10"], ["status", "--porcelain"])
        )
        return last + ("-changed" if changes else "") if last else None
    return None


class ProcessError(Exception):
    """A process failed or took too long: which, and the last lines that it wrote."""


@dataclass(frozen=True)
class Finished:
    """What a process wrote, and what it took: wall seconds, peak resident megabytes (1e6 bytes), and the CPUs that
    others kept busy meanwhile (0.5: half of one), None where the system does not tell."""

    stdout: str
    stderr: str
    seconds: float
    peak_mb: float
    foreign: float | None


def run(command: Sequence[str], timeout: float, neighbour: Neighbour | None = None) -> Finished:
    """Run a process to its end. Raises ProcessError."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy, theirs, started = busy_seconds(), neighbour.cpu_seconds() if neighbour else 0.0, time.perf_counter()
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        except OSError as error:
            raise ProcessError(f"{command[0]} cannot be run: {error.strerror}") from error
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        own = used.ru_utime + used.ru_stime + (neighbour.cpu_seconds() - theirs if neighbour else 0.0)
        after = busy_seconds()
        foreign = None if busy is None or after is None else max(0.0, after - busy - own) / seconds
        stdout, stderr = _text(out), _text(err)
    if process.returncode:
        ended = f"did not end within {timeout:.0f} s" if seconds >= timeout else f"ended with {process.returncode}"
        last = " / ".join((stderr.strip() or stdout.strip()).splitlines()[-3:]) or "it wrote nothing"
        raise ProcessError(f"{' '.join(map(str, command))} {ended}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(stdout, stderr, seconds, used.ru_maxrss * unit / 1e6, foreign)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def busy_seconds() -> float | None:
    """CPU seconds of all programs since the system started; time stolen by other guests counts as busy."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
            int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / TICKS


class Neighbour:
    """A program that keeps one core busy, while the with-statement lasts."""

    def __enter__(self) -> Neighbour:
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICKS
