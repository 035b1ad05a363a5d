"""The executor: every thread of a team walks the records of a plan, and waits for the others where it must."""

from __future__ import annotations

import numpy as np

from edgellm.kernels.attention import splits_keys
from edgellm.kernels.fetch import aim, fetch_more, fetching
from edgellm.kernels.layout import (
    ARRIVAL_BYTES,
    BARRIER,
    CELL,
    CONTROL_GENERATION,
    CONTROL_N_RECORDS,
    CONTROL_RECORDS,
    CONTROL_STEP,
    CONTROL_STOP,
    MOST_THREADS,
    NEXT_WEIGHT,
    OP,
    RECORD_CELLS,
    STEP_ARRIVALS,
    STEP_ARRIVED,
)  # fmt: skip
from edgellm.kernels.prepare import rows_of
from edgellm.kernels.primitives import atomic_get, atomic_set, call_op, get_i64, pause, yield_cpu

SPINS_BEFORE_YIELD = 2000
START: int = np.int64(0)  # for a literal 0, Numba would compile what it is passed to once more


def run(records: int, n_records: int, step: int, thread: int, n_threads: int) -> None:
    """Do a plan. Every thread of the team calls this with the same step, each with its number."""
    arrivals, arrived = get_i64(step + STEP_ARRIVALS), get_i64(step + STEP_ARRIVED)
    cells, weights = fetching(step, thread), START
    for i in range(n_records):
        record = records + i * RECORD_CELLS * CELL
        call_op(get_i64(record + OP), record, step, thread, n_threads)
        waits = n_threads > 1 and has_barrier(record, step, n_threads)
        if waits:
            arrived += 1
            atomic_set(arrivals + thread * ARRIVAL_BYTES, arrived)
        if weights != get_i64(record + NEXT_WEIGHT):
            weights = get_i64(record + NEXT_WEIGHT)
            aim(cells, record, thread, n_threads)
        if waits:
            for other in range(n_threads):
                wait(arrivals + other * ARRIVAL_BYTES, arrived, cells)


def has_barrier(record: int, step: int, n_threads: int) -> bool:
    """Whether threads wait for each other after an op."""
    kind = get_i64(record + BARRIER)
    if kind == 2:
        return rows_of(record, step) > 1
    if kind == 4 and rows_of(record, step) > 1:
        return True
    return splits_keys(record, step, n_threads) if kind >= 3 else kind == 1


def wait(arrival: int, arrived: int, cells: int) -> None:
    """Until another thread is here: what it counts only grows, so nobody has to reset it."""
    spins = 0
    while atomic_get(arrival) < arrived:
        if not fetch_more(cells):
            if spins > SPINS_BEFORE_YIELD:
                yield_cpu()
            else:
                pause()
        spins += 1


def serve(control: int, thread: int, seen: int, patience: int) -> int:
    """A worker between and during steps: spins for the next one, and returns what it has seen when none comes for
    `patience` spins, or -1 at the end."""
    spins = 0
    while spins < patience:
        generation = atomic_get(control + CONTROL_GENERATION)
        if generation == seen:
            pause()
            spins += 1
            continue
        seen, spins = generation, 0
        if get_i64(control + CONTROL_STOP):
            return -1
        n_threads = generation % MOST_THREADS
        if thread < n_threads:
            run(get_i64(control + CONTROL_RECORDS), get_i64(control + CONTROL_N_RECORDS),
                get_i64(control + CONTROL_STEP), thread, n_threads)  # fmt: skip
    return seen
