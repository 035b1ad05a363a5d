"""What this machine can do at most: reading memory, and int8 dot products. Percentages of these limits mean something.

    python benchmarks/limits.py [--threads N] [--json]

The kernels are made of the primitives of edgellm's own ones, and so compiled for this CPU, whatever it is:

    read    vector loads of a buffer over and over, a contiguous part for each thread as in decoding; software prefetch
            at several distances, of which the best counts
    dot     the int8 dot product of the ISA on as many rows of accumulators as a prefill kernel holds in registers

Threads stay the same for all measurements. Figures are medians; a gigabyte is 1e9 bytes, a multiply-add two operations.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from threading import Barrier
from typing import Any

import numpy as np

from edgellm import isa
from edgellm.kernels import Kernel
from edgellm.kernels.primitives import (
    add,
    load_bytes,
    load_f32,
    prefetch,
    rows_dot4,
    rows_scaled,
    rows_zero_ints,
    store_f32,
    store_rows,
    zero,
)  # fmt: skip
from edgellm.kernels.team import physical_cores

LINE = 64
"""Bytes of a vector of 16 lanes, and of a line of most caches."""
MEGABYTE = 1_000_000
SIZES = (0.2, 0.5, 1, 4, 8, 16, 32, 64, 96, 150, 256, 512)
"""MB to read: from what one core's L2 cache holds to what no cache does."""
DISTANCES = (0, 1024, 4096)
"""Bytes that software prefetch runs ahead; 0 is none."""
SECONDS = 0.06
"""Of one run, beside which the start of the threads is nothing."""
RUNS = 5


# ---- kernels


def read(start: int, n_lines: int, passes: int, ahead: int, out: int) -> None:
    """Load all lines of a buffer, four at a time, that many times over."""
    a, b, c, d = zero(), zero(), zero(), zero()
    for _pass in range(passes):
        p = start
        for _line in range(n_lines // 4):
            for line in range(4):
                prefetch(p + ahead + line * 64)
            a = add(a, load_f32(p))
            b = add(b, load_f32(p + 64))
            c = add(c, load_f32(p + 128))
            d = add(d, load_f32(p + 192))
            p += 256
    store_f32(out, add(add(a, b), add(c, d)))


def dot(weights: int, n: int, codes: int, scales: int, out: int) -> None:
    """64 weights, of 8 x 64 that stay in the first cache, times every row's four codes, which stay in registers."""
    sums = rows_zero_ints()
    for i in range(n):
        sums = rows_dot4(sums, load_bytes(weights + (i & 7) * 64), codes)
    store_rows(out, rows_scaled(sums, scales))


def compiled(body: Callable[..., None], rows: int = 0) -> Callable[..., None]:
    """A body compiled for this CPU, to be called with integers; it runs without the interpreter's lock."""
    from edgellm.kernels._numba import Bodies

    kernel = Bodies(isa.detect()).in_process(Kernel(body, rows))
    function: Callable[..., None] = kernel.ctypes
    _KEPT.append(kernel)
    return function


_KEPT: list[Any] = []
"""Compiled code, which goes away with its object."""


# ---- measuring


class Threads:
    """Threads that do the same work at the same time."""

    def __init__(self, n: int) -> None:
        self.n, self._pool, self._start = n, ThreadPoolExecutor(n), Barrier(n)

    def seconds(self, work: Callable[[int], None]) -> float:
        """From the first thread's start to the last one's end."""

        def timed(thread: int) -> tuple[float, float]:
            self._start.wait()
            started = time.perf_counter()
            work(thread)
            return started, time.perf_counter()

        starts, ends = zip(*self._pool.map(timed, range(self.n)), strict=True)
        return float(max(ends) - min(starts))


def rate(threads: Threads, amount: float, work: Callable[[int, int], None], runs: int = RUNS) -> float:
    """amount of one pass / seconds, as the median of some runs of work(thread, passes) that last long enough."""

    def seconds(passes: int) -> float:
        return threads.seconds(lambda thread: work(thread, passes))

    passes, taken = 1, seconds(1)
    while taken < SECONDS / 2:
        passes = math.ceil(passes * min(10.0, max(2.0, SECONDS / taken)))
        taken = seconds(passes)
    return amount * passes / median(seconds(passes) for _ in range(runs))


def read_rate(n_bytes: int, threads: Threads) -> float:
    """Bytes per second that the threads read of a buffer of that size, each its own part."""
    kernel, out = compiled(read), aligned(LINE * threads.n)
    part = -(-n_bytes // (threads.n * 4 * LINE)) * 4 * LINE
    memory = aligned(part * threads.n)
    memory.view(np.float32)[:] = 1  # touched: a page that nobody has written to is the system's one page of zeros
    at = address(memory)

    def work(ahead: int) -> Callable[[int, int], None]:
        return lambda thread, passes: kernel(
            at + thread * part, part // LINE, passes, ahead, address(out) + thread * LINE
        )

    best = max(DISTANCES, key=lambda ahead: rate(threads, part * threads.n, work(ahead), runs=1))
    return rate(threads, part * threads.n, work(best))


def dot_rate(threads: Threads) -> float:
    """int8 operations per second, two for a multiply-add."""
    rows = isa.detect().ROWS
    kernel = compiled(dot, rows)
    weights, codes, scales = aligned(8 * LINE), aligned(LINE), aligned(LINE)
    weights[:], codes[:], scales.view(np.float32)[:] = 3, 1, 1
    out = aligned(LINE * rows * threads.n)

    def work(thread: int, passes: int) -> None:
        target = address(out) + thread * LINE * rows
        kernel(address(weights), 1000 * passes, address(codes), address(scales), target)

    return rate(threads, 2 * 64 * rows * 1000 * threads.n, work)


def aligned(n_bytes: int) -> Any:
    """Bytes of memory that begin on a page."""
    memory = np.zeros(n_bytes + 4096, np.uint8)
    first = -address(memory) % 4096
    return memory[first : first + n_bytes]


def address(memory: Any) -> int:
    return int(memory.ctypes.data)


# ---- what is printed


def measured(n_threads: int) -> dict[str, Any]:
    """{"isa", "threads", "dot_gops": per number of threads, "read_gb_per_s": per number of threads and MB}"""
    counts = sorted({1, n_threads})
    dots, reads = {}, {}
    for n in counts:
        threads = Threads(n)
        dots[str(n)] = dot_rate(threads) / 1e9
        reads[str(n)] = {f"{size:g}": read_rate(int(size * MEGABYTE), threads) / 1e9 for size in SIZES}
    return {"isa": isa.detect().__name__.rpartition(".")[2], "dot_gops": dots, "read_gb_per_s": reads}


def table(limits: dict[str, Any]) -> str:
    """Threads from left to right, sizes from top to bottom."""
    counts = list(limits["dot_gops"])
    lines = ["".join([f"{limits['isa']:<24}", *(f"{n + ' thread' + 's' * (n != '1'):>12}" for n in counts)])]
    lines += ["".join([f"{'int8 dot, GOPS':<24}", *(f"{limits['dot_gops'][n]:>12.0f}" for n in counts)])]
    for size in limits["read_gb_per_s"][counts[0]]:
        row = (f"{limits['read_gb_per_s'][n][size]:>12.1f}" for n in counts)
        lines += ["".join([f"{'read ' + size + ' MB, GB/s':<24}", *row])]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Read bandwidth and int8 peak of this machine.")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N", help="default: all cores")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; expected 1 or more")
    limits = measured(options.threads)
    print(json.dumps(limits, indent=1) if options.json else table(limits))


if __name__ == "__main__":
    main(sys.argv[1:])
