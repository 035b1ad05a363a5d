"""Seconds from process start: the import, the command line's help, the first token; and peak memory. Medians of 7."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 7
FIRST_TOKEN = "from edgellm import load; load({!r}).generate('Once upon a time', max_tokens=1, temperature=0)"
CASES = {
    "python -c pass": ["-c", "pass"],
    "import edgellm": ["-c", "import edgellm"],
    "edgellm --help": ["-m", "edgellm", "--help"],
    "first token, stories260k": ["-c", FIRST_TOKEN.format("stories260k")],
    "first token, smollm2": ["-c", FIRST_TOKEN.format("smollm2")],
}
MEMORY = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    for name, arguments in CASES.items():
        times = [seconds(arguments) for _ in range(RUNS)]
        print(f"{name:<28}{statistics.median(times):.3f} s  [{min(times):.3f}-{max(times):.3f}]")
    if sys.platform == "linux":
        code = FIRST_TOKEN.format("smollm2") + MEMORY
        peak = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        print(f"{'peak RSS, smollm2':<28}{int(peak) / 1024:.0f} MB")
