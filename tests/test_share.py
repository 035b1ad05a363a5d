"""Blocks of a matrix, shared out: each is computed once, whoever is fast, and whoever comes late."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.kernels import layout
from edgellm.kernels.share import BLOCK_BITS, N_CLAIMS, NONE, claimed_from, run_start, take_first, take_next


class Op:
    """A matmul of some blocks, one of several that a team does."""

    def __init__(self, n_blocks, number, arrivals):
        self.n_threads, self.arrivals = len(arrivals), arrivals
        self.record = np.zeros(layout.RECORD_CELLS, np.int64)
        self.record[layout.N_BLOCKS // 8], self.record[layout.CLAIM // 8] = n_blocks, number % N_CLAIMS
        self.step = np.zeros(layout.STEP_CELLS, np.int64)
        self.step[layout.STEP_ARRIVALS // 8] = arrivals.ctypes.data

    def taken(self, thread):
        """The blocks that a thread takes, as it asks for them."""
        of_op = self.record.ctypes.data, self.step.ctypes.data, thread, self.n_threads
        block, owner = take_first(*of_op)
        while block != NONE:
            yield block
            block, owner = take_next(*of_op, owner, block)


def team(n_threads):
    return np.zeros((n_threads, layout.ARRIVAL_BYTES // 8), np.int64)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_block_once(sizes, n_threads, random):
    """In ops one after the other, whichever thread asks next."""
    arrivals = team(n_threads)
    for number, n_blocks in enumerate(sizes):
        arrivals[:, 0] += 1
        op, found = Op(n_blocks, number, arrivals), []
        threads = [op.taken(thread) for thread in range(n_threads)]
        while threads:
            thread = random.choice(threads)
            try:
                found.append(next(thread))
            except StopIteration:
                threads.remove(thread)
        assert sorted(found) == list(range(n_blocks))


@pytest.mark.parametrize("n_threads", [2, 3])
def test_a_thread_that_does_not_come_keeps_only_its_own_part(n_threads):
    arrivals = team(n_threads)
    arrivals[:, 0] = 7
    op = Op(48, 0, arrivals)
    found = [block for thread in range(1, n_threads) for block in op.taken(thread)]
    own = range(claimed_from(op.record.ctypes.data, 0, n_threads))
    assert sorted(found) == sorted(set(range(48)) - set(own))
    assert list(op.taken(0)) == list(own)
    assert len(own) == 48 // n_threads - 48 // n_threads // 4


def test_ops_without_a_barrier_between_them_do_not_meet():
    """One thread is done with all three before the other begins."""
    arrivals = team(2)
    arrivals[:, 0] = 3
    ops = [Op(n_blocks, number, arrivals) for number, n_blocks in enumerate((36, 12, 12))]
    first = [list(op.taken(1)) for op in ops]
    second = [list(op.taken(0)) for op in ops]
    for op, found, rest in zip((36, 12, 12), first, second, strict=True):
        assert sorted(found + rest) == list(range(op))
        assert found[0] == op // 2
        assert len(found) > op // 2


def test_alone_all_is_its_own():
    arrivals = team(1)
    op = Op(5, 0, arrivals)
    assert list(op.taken(0)) == list(range(5))
    assert not arrivals.any()
    assert run_start(op.record.ctypes.data, 1, 1) == 5 < 1 << BLOCK_BITS
