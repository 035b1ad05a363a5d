"""What a thread reads next: weights come from memory while it computes, waits, and goes from op to op.

Decoding is bound by memory, so that memory should never be idle. Each block of weights fetches the next one that its
thread reads, and a slice's last block the first of the thread's slice of the next matrix.
"""

from __future__ import annotations

from edgellm.kernels.layout import NEXT_BLOCK_BYTES, NEXT_BLOCKS, NEXT_WEIGHT
from edgellm.kernels.primitives import get_i64

FARTHEST = 16384
"""Bytes ahead of what is used; more would be a burden for small caches."""


def next_slice(record: int, thread: int, n_threads: int) -> int:
    """Address of the weights that a thread reads first in the next matmul."""
    block = get_i64(record + NEXT_BLOCKS) * thread // n_threads
    return get_i64(record + NEXT_WEIGHT) + block * get_i64(record + NEXT_BLOCK_BYTES)
