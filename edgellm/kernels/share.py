"""How threads share the blocks of a matrix: each has a run of them, and who is done early takes some of another's last.

Cores differ, and one may be disturbed: with fixed runs all would wait for the slowest after every op. Outputs do not
depend on who computes them. Most of a run is its owner's without a word; blocks of its last part, anyone's, are claimed
one by one, in a cell that holds

    barriers passed << BLOCK_BITS | next block to claim

so that the first who comes to an op starts its count, whatever an earlier op has left there. Ops between two barriers
have different cells, by CLAIM.
"""

from __future__ import annotations

from edgellm.kernels.layout import ARRIVAL_BYTES, CELL, CLAIM, CLAIMS, N_BLOCKS, STEP_ARRIVALS
from edgellm.kernels.primitives import atomic_get, atomic_next, atomic_raise, get_i64

N_CLAIMS = 4
"""Cells of a thread: more than there are matmuls from one barrier to the next."""
BLOCK_BITS = 24
ANYONES = 4
"""One block in so many may be computed by another thread than its owner."""
NONE = (1 << BLOCK_BITS) - 1


def run_start(record: int, owner: int, n_threads: int) -> int:
    return get_i64(record + N_BLOCKS) * owner // n_threads


def claimed_from(record: int, owner: int, n_threads: int) -> int:
    """The first block of a run that is anyone's; of a thread that is alone, none is."""
    start, end = run_start(record, owner, n_threads), run_start(record, owner + 1, n_threads)
    return end - (end - start) // ANYONES if n_threads > 1 else end


def take_first(record: int, step: int, thread: int, n_threads: int) -> tuple[int, int]:
    """What a thread computes first, and whose it is: as of take_next."""
    return take_next(record, step, thread, n_threads, thread, run_start(record, thread, n_threads) - 1)


def take_next(record: int, step: int, thread: int, n_threads: int, owner: int, block: int) -> tuple[int, int]:
    """What a thread computes after an owner's block, and whose it is; NONE where nothing is left."""
    if owner == thread and block + 1 < claimed_from(record, thread, n_threads):
        return block + 1, owner
    for _ in range((thread - owner - 1) % n_threads + 1):  # from this owner on, once around
        if n_threads > 1:
            block = claim(record, step, thread, owner, n_threads)
            if block < run_start(record, owner + 1, n_threads):
                return block, owner
        owner = (owner + 1) % n_threads
    return NONE, thread


def claim(record: int, step: int, thread: int, owner: int, n_threads: int) -> int:
    """The next of the blocks that are anyone's; from the run's end on there are none."""
    cells = get_i64(step + STEP_ARRIVALS)
    cell = cells + owner * ARRIVAL_BYTES + CLAIMS + CELL * get_i64(record + CLAIM)
    started = get_i64(cells + thread * ARRIVAL_BYTES) << BLOCK_BITS
    found = atomic_get(cell)
    if found < started:
        atomic_raise(cell, found, started + claimed_from(record, owner, n_threads))
    return atomic_next(cell) & NONE
