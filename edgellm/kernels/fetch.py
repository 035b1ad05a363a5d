"""What a thread reads next: weights come from memory while it computes, waits, and goes from op to op.

Decoding is bound by memory, so that memory should never be idle. Each block of weights fetches the next one that its
thread reads, and a slice's last block the first of the thread's slice of the next matrix. A thread that waits for the
others fetches more of that slice.
"""

from __future__ import annotations

from edgellm.kernels.layout import NEXT_BLOCK_BYTES, NEXT_BLOCKS, NEXT_WEIGHT
from edgellm.kernels.primitives import get_i64, prefetch

FARTHEST = 16384
"""Bytes ahead of what is used; more would be a burden for small caches."""


AT_ONCE = 1024
"""Bytes that a thread that waits asks for between two looks at what it waits for."""
WORTH_FETCHING = 1 << 18
"""Bytes of a slice that are fetched while waiting: what a core's own cache holds besides all else."""


def next_slice(record: int, thread: int, n_threads: int) -> int:
    """Address of the weights that a thread reads first in the next matmul."""
    block = get_i64(record + NEXT_BLOCKS) * thread // n_threads
    return get_i64(record + NEXT_WEIGHT) + block * get_i64(record + NEXT_BLOCK_BYTES)


def next_slice_end(record: int, thread: int, n_threads: int) -> int:
    """Where what is worth fetching of that slice ends."""
    block = get_i64(record + NEXT_BLOCKS) * (thread + 1) // n_threads
    end = get_i64(record + NEXT_WEIGHT) + block * get_i64(record + NEXT_BLOCK_BYTES)
    return min(end, next_slice(record, thread, n_threads) + WORTH_FETCHING)


def fetch(start: int) -> int:
    """Ask for AT_ONCE bytes; returns where they end."""
    for line in range(0, AT_ONCE, 64):
        prefetch(start + line)
    return start + AT_ONCE
