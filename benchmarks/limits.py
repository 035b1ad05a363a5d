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
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from edgellm import isa
from edgellm.kernels import Kernel
from edgellm.kernels.bandwidth import LINE, Threads, address, aligned, rate, read_rate
from edgellm.kernels.primitives import load_bytes, rows_dot4, rows_scaled, rows_zero_ints, store_rows
from edgellm.kernels.team import physical_cores

MEGABYTE = 1_000_000
SIZES = (0.2, 0.5, 1, 4, 8, 16, 32, 64, 96, 150, 256, 512)
"""MB to read: from what one core's L2 cache holds to what no cache does."""


# ---- kernels


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
