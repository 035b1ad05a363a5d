"""A mixture of experts: every row takes some of them, and every expert the rows that took it.

ROUTES, for a step of `rows` rows and pairs = rows * N_USED, is int32 and, for the shares, float32:

    ends     [N_EXPERTS + 1]   the pairs of expert e are ends[e] .. ends[e + 1]
    rows     [pairs]           the row that each pair stands for, ascending for one expert
    places   [rows][N_USED]    where a row's pairs are, its most probable expert first
    shares   [rows][N_USED]

What is computed for a pair does not depend on the other pairs, and a row's are summed in the order of its places.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.fetch import FARTHEST
from edgellm.kernels.layout import (
    ADDS,
    COLS,
    N_BLOCKS,
    N_EXPERTS,
    N_USED,
    NORMALIZES,
    ROUTES,
    ROWS_N,
    SOURCE,
    SOURCE_STRIDE,
    STEP_PACKED,
    STEP_ROWS,
    STEP_SCRATCH,
    STEP_SCRATCH_BYTES,
    TARGET,
    TARGET_STRIDE,
    WEIGHT,
)  # fmt: skip
from edgellm.kernels.matmul import block_bytes, block_times_rows
from edgellm.kernels.prepare import packed_bytes, prepare_rows, rows_together
from edgellm.kernels.primitives import (
    add,
    exp,
    fill,
    first,
    fma,
    get_f32,
    get_i32,
    get_i64,
    lanes_max,
    lanes_sum,
    load_f32,
    maximum,
    mul,
    set_f32,
    set_i32,
    store_f32,
    sub,
    zero,
)  # fmt: skip


def places_of(record: int, step: int) -> int:
    pairs = get_i64(step + STEP_ROWS) * get_i64(record + N_USED)
    return get_i64(record + ROUTES) + 4 * (get_i64(record + N_EXPERTS) + 1 + pairs)


def shares_of(record: int, step: int) -> int:
    return places_of(record, step) + 4 * get_i64(step + STEP_ROWS) * get_i64(record + N_USED)


def route(record: int, step: int, thread: int, n_threads: int) -> None:
    """The op: one thread chooses the experts of all rows."""
    if thread != 0:
        return
    n_rows, n_used, n_experts = get_i64(step + STEP_ROWS), get_i64(record + N_USED), get_i64(record + N_EXPERTS)
    routes, places, shares = get_i64(record + ROUTES), places_of(record, step), shares_of(record, step)
    for expert in range(n_experts + 1):
        set_i32(routes + 4 * expert, 0)
    for row in range(n_rows):
        logits = get_i64(record + SOURCE) + row * get_i64(record + SOURCE_STRIDE)
        choose(logits, n_experts, n_used, get_i64(record + NORMALIZES), places, shares)
        for i in range(n_used):  # places are the experts' numbers at first; ends count what each has
            count = routes + 4 * (get_i32(places + 4 * i) + 1)
            set_i32(count, get_i32(count) + 1)
        places += 4 * n_used
        shares += 4 * n_used
    for expert in range(n_experts):
        set_i32(routes + 4 * (expert + 1), get_i32(routes + 4 * (expert + 1)) + get_i32(routes + 4 * expert))
    give_places(record, step, n_rows, n_used, n_experts)


def give_places(record: int, step: int, n_rows: int, n_used: int, n_experts: int) -> None:
    """Pairs in the order of experts, then rows: from the last row down, each expert's last free place."""
    routes, places = get_i64(record + ROUTES), places_of(record, step)
    for row in range(n_rows - 1, -1, -1):
        for i in range(n_used):
            at = places + 4 * (row * n_used + i)
            end = routes + 4 * (get_i32(at) + 1)
            set_i32(end, get_i32(end) - 1)
            set_i32(at, get_i32(end))
            set_i32(routes + 4 * (n_experts + 1 + get_i32(end)), row)
    # Every end came down to its expert's start: the next one's.
    for expert in range(n_experts):
        set_i32(routes + 4 * expert, get_i32(routes + 4 * (expert + 1)))
    set_i32(routes + 4 * n_experts, n_rows * n_used)


def choose(logits: int, n_experts: int, n_used: int, normalizes: int, chosen: int, shares: int) -> None:
    """The most probable experts of a row, the first of equals, and their probabilities. The logits are used up."""
    highest = fill(get_f32(logits))
    for i in range(0, n_experts, 16):
        highest = maximum(highest, first(n_experts - i, load_f32(logits + 4 * i), highest))
    peak, sums = fill(lanes_max(highest)), zero()
    for i in range(0, n_experts, 16):
        weight = exp(sub(load_f32(logits + 4 * i), peak))
        sums = add(sums, first(n_experts - i, weight, zero()))
        store_f32(logits + 4 * i, weight)
    for i in range(n_used):
        best = best_of(logits, n_experts)
        set_i32(chosen + 4 * i, best)
        set_f32(shares + 4 * i, get_f32(logits + 4 * best))
        set_f32(logits + 4 * best, -1.0)
    total = sum_of(shares, n_used) if normalizes else lanes_sum(sums)
    for i in range(n_used):
        set_f32(shares + 4 * i, get_f32(shares + 4 * i) / total)


def best_of(values: int, count: int) -> int:
    best = 0
    for i in range(1, count):
        if get_f32(values + 4 * i) > get_f32(values + 4 * best):
            best = i
    return best


def sum_of(values: int, count: int) -> Any:
    total = get_f32(values)
    for i in range(1, count):
        total += get_f32(values + 4 * i)
    return total


def expert_prepare(record: int, step: int, thread: int, n_threads: int) -> None:
    """As prepare.prepare, for the pairs of each expert."""
    turn, most = 0, get_i64(record + ROWS_N)
    for expert in range(get_i64(record + N_EXPERTS)):
        pair, end = pairs_of(record, expert)
        while pair < end:
            count = rows_together(end - pair, most)
            if turn % n_threads == thread:
                packed = get_i64(step + STEP_PACKED) + pair * packed_bytes(record)
                prepare_rows(record, step, thread, pair, count, packed)
            pair += count
            turn += 1


def expert_matmul(record: int, step: int, thread: int, n_threads: int) -> None:
    """As matmul.matmul: each thread takes a run of blocks of every expert that has pairs."""
    n_blocks, size = get_i64(record + N_BLOCKS), block_bytes(record)
    outputs = get_i64(step + STEP_SCRATCH) + thread * get_i64(step + STEP_SCRATCH_BYTES)
    ahead, packed, target = min(size, FARTHEST), get_i64(step + STEP_PACKED), get_i64(record + TARGET)
    for expert in range(get_i64(record + N_EXPERTS)):
        pair, end = pairs_of(record, expert)
        if pair < end:
            weight = get_i64(get_i64(record + WEIGHT) + 8 * expert)
            for block in range(n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads):
                block_times_rows(record, weight + block * size, target, block, ahead, pair, end, packed, outputs)


def pairs_of(record: int, expert: int) -> tuple[int, int]:
    ends = get_i64(record + ROUTES) + 4 * expert
    return int(get_i32(ends)), int(get_i32(ends + 4))


def combine(record: int, step: int, thread: int, n_threads: int) -> None:
    """The sum of what a row's experts made, times their shares, stored or added."""
    n_used, adds = get_i64(record + N_USED), get_f32(record + ADDS)
    for row in range(thread, get_i64(step + STEP_ROWS), n_threads):
        places, shares = places_of(record, step) + 4 * row * n_used, shares_of(record, step) + 4 * row * n_used
        target = get_i64(record + TARGET) + row * get_i64(record + TARGET_STRIDE)
        for column in range(0, get_i64(record + COLS), 16):
            y = zero()
            for i in range(n_used):
                source = get_i64(record + SOURCE) + int(get_i32(places + 4 * i)) * get_i64(record + SOURCE_STRIDE)
                y = fma(load_f32(source + 4 * column), fill(get_f32(shares + 4 * i)), y)
            if adds != 0:
                y = add(load_f32(target + 4 * column), mul(y, fill(adds)))
            store_f32(target + 4 * column, y)
