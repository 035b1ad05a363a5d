"""How fast this machine reads memory: what bounds decoding, as every weight is read for each token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from threading import Barrier
from typing import Any

import numpy as np

from edgellm import isa
from edgellm.kernels import compiler
from edgellm.kernels.primitives import add, load_f32, prefetch, store_f32, zero

LINE = 64
"""Bytes of a vector of 16 lanes, and of a line of most caches."""
DISTANCES = (0, 1024, 4096)
"""Bytes that software prefetch runs ahead; 0 is none."""
SECONDS = 0.06
"""Of one run, beside which the start of the threads is nothing."""
RUNS = 5


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
    kernel, out = compiler(isa.detect()).function(read), aligned(LINE * threads.n)
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


def aligned(n_bytes: int) -> Any:
    """Bytes of memory that begin on a page."""
    memory = np.zeros(n_bytes + 4096, np.uint8)
    first = -address(memory) % 4096
    return memory[first : first + n_bytes]


def address(memory: Any) -> int:
    return int(memory.ctypes.data)
