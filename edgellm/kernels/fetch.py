"""What a thread reads next: weights come from memory while it computes, waits, and goes from op to op.

Decoding is bound by memory, so that memory should never be idle. Each block of weights fetches the next one that its
thread reads, and a slice's last block the first of the thread's slice of the next matrix. Of that slice, a thread
fetches more wherever it does not read weights: as it waits for the others, prepares rows, and attends.
"""

from __future__ import annotations

from edgellm.kernels.layout import (
    ARRIVAL_BYTES,
    FETCH_END,
    FETCHED,
    NEXT_BLOCK_BYTES,
    NEXT_BLOCKS,
    NEXT_WEIGHT,
    STEP_ARRIVALS,
)  # fmt: skip
from edgellm.kernels.primitives import get_i64, prefetch, set_i64

FARTHEST = 16384
"""Bytes ahead of what is used; more would be a burden for small caches."""


AT_ONCE = 1024
"""Bytes that a thread asks for between two pieces of other work: what a core can wait for at once."""
WORTH_FETCHING = 1 << 18
"""Bytes of a slice that are fetched so: what a core's own cache holds besides all else."""


def next_slice(record: int, thread: int, n_threads: int) -> int:
    """Address of the weights that a thread reads first in the next matmul."""
    block = get_i64(record + NEXT_BLOCKS) * thread // n_threads
    return get_i64(record + NEXT_WEIGHT) + block * get_i64(record + NEXT_BLOCK_BYTES)


def fetching(step: int, thread: int) -> int:
    """Address of the thread's own cells FETCHED and FETCH_END."""
    return get_i64(step + STEP_ARRIVALS) + thread * ARRIVAL_BYTES


def aim(cells: int, record: int, thread: int, n_threads: int) -> None:
    """From here on fetch the slice that the thread reads after this op; its first block is on its way."""
    start, end = next_slice(record, thread, n_threads), next_slice(record, thread + 1, n_threads)
    set_i64(cells + FETCHED, start + get_i64(record + NEXT_BLOCK_BYTES))
    set_i64(cells + FETCH_END, min(end, start + WORTH_FETCHING))


def fetch_more(cells: int) -> bool:
    """Ask for AT_ONCE bytes of that slice; whether there were any left."""
    start = get_i64(cells + FETCHED)
    if start >= get_i64(cells + FETCH_END):
        return False
    for line in range(0, AT_ONCE, 64):
        prefetch(start + line)
    set_i64(cells + FETCHED, start + AT_ONCE)
    return True
