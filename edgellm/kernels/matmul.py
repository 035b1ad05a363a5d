"""A matrix times the rows of a step: the dot kernels block by block, their outputs stored or added."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.fetch import FARTHEST, next_slice
from edgellm.kernels.layout import (
    ADDS,
    BIAS,
    DOT_1,
    DOT_4,
    DOT_N,
    GATHERS,
    LOW,
    LOW_B,
    LOW_RANK,
    LOW_STRIDE,
    N_TILES,
    PAIR,
    ROWS_N,
    SAME_INPUT,
    SCALE,
    SOFTCAP,
    STEP_LOGITS,
    STEP_PACKED,
    STEP_SCRATCH,
    STEP_SCRATCH_BYTES,
    TARGET,
    TARGET_STRIDE,
    TILE_BYTES,
    WEIGHT,
)  # fmt: skip
from edgellm.kernels.prepare import capped, packed_bytes, prepare_rows, rows_of, rows_together
from edgellm.kernels.primitives import add, call_dot, fill, fma, get_f32, get_i64, load_f32, mul, store_f32, zero
from edgellm.kernels.share import NONE, run_start, take_first, take_next

BLOCKS_TOGETHER, ROWS_TOGETHER = 8, 64
"""Weights are read from memory once, and some of them with some rows from the caches until all have met. The number of
rows is a multiple of what dot kernels take."""


def matmul(record: int, step: int, thread: int, n_threads: int) -> None:
    """The op: blocks of 16 outputs are shared out, for all rows."""
    rows = rows_of(record, step)
    outputs = get_i64(step + STEP_SCRATCH) + thread * get_i64(step + STEP_SCRATCH_BYTES)
    packed = prepared(record, step, thread, rows)
    target = get_i64(step + STEP_LOGITS) if get_i64(record + GATHERS) else get_i64(record + TARGET)
    weight, size = get_i64(record + WEIGHT), block_bytes(record)
    if rows == 1:
        block, owner = take_first(record, step, thread, n_threads)
        while block != NONE:
            after, owner = take_next(record, step, thread, n_threads, owner, block)
            ahead = fetches_to(record, block, after, thread, n_threads)
            block_times_rows(record, weight + block * size, target, block, ahead, 0, 1, packed, outputs)
            block = after
        return
    start, end = run_start(record, thread, n_threads), run_start(record, thread + 1, n_threads)
    for first in range(start, end, BLOCKS_TOGETHER):
        for row in range(0, rows, ROWS_TOGETHER):
            last_row = min(row + ROWS_TOGETHER, rows)
            for block in range(first, min(first + BLOCKS_TOGETHER, end)):
                ahead = fetches_to(record, block, block + 1 if block + 1 < end else NONE, thread, n_threads)
                block_times_rows(record, weight + block * size, target, block, ahead, row, last_row, packed, outputs)


def block_times_rows(
    record: int, weight: int, target: int, block: int, ahead: int, row: int, end: int, packed: int, outputs: int
) -> None:
    """16 outputs of rows row..end."""
    while row < end:
        count = rows_together(end - row, get_i64(record + ROWS_N))
        multiply(record, weight, ahead, packed + row * packed_bytes(record), count, outputs)
        store_outputs(record, target, block, row, count, outputs)
        row += count


def block_bytes(record: int) -> int:
    return get_i64(record + N_TILES) * get_i64(record + TILE_BYTES)


def prepared(record: int, step: int, thread: int, rows: int) -> int:
    """The activations: those that the threads have prepared together; a single row each prepares for itself."""
    if rows != 1:
        return get_i64(step + STEP_PACKED)
    half = get_i64(step + STEP_SCRATCH_BYTES) // 2
    packed = get_i64(step + STEP_SCRATCH) + (2 * thread + 1) * half
    if not get_i64(record + SAME_INPUT):
        prepare_rows(record, step, thread, 0, 1, packed)
    return packed


def fetches_to(record: int, block: int, after: int, thread: int, n_threads: int) -> int:
    """How far from the weights of a block stand those that the thread reads after it."""
    size = block_bytes(record)
    if after == block + 1:
        return min(size, FARTHEST)
    if after != NONE:
        return (after - block) * size
    return next_slice(record, thread, n_threads) - (get_i64(record + WEIGHT) + block * size)


def multiply(record: int, weight: int, ahead: int, codes: int, count: int, outputs: int) -> None:
    """A block of weights times `count` rows: [row][16] float32."""
    call_dot(kernel(record, count), weight, ahead, get_i64(record + N_TILES), codes, outputs)
    if get_i64(record + GATHERS) and get_f32(record + SCALE) != 0:
        for i in range(count):
            logits = mul(load_f32(outputs + 64 * i), fill(get_f32(record + SCALE)))
            store_f32(outputs + 64 * i, capped(logits, get_f32(record + SOFTCAP)))


def kernel(record: int, count: int) -> int:
    if count == 1:
        return get_i64(record + DOT_1)
    return get_i64(record + DOT_4) if count == 4 else get_i64(record + DOT_N)


def store_outputs(record: int, target: int, block: int, row: int, count: int, outputs: int) -> None:
    """Write or add the block's 16 outputs of each row."""
    stride, adds, bias = get_i64(record + TARGET_STRIDE), get_f32(record + ADDS), get_i64(record + BIAS)
    place = 64 * block_place(block, get_i64(record + PAIR))
    at = target + row * stride + place
    for i in range(count):
        y = load_f32(outputs + 64 * i)
        if bias:
            y = add(y, load_f32(bias + place))
        if get_i64(record + LOW_RANK):
            y = add(y, low_rank(record, place, row + i))
        if adds != 0:
            y = add(load_f32(at), mul(y, fill(adds)))
        store_f32(at, y)
        at += stride


def low_rank(record: int, place: int, row: int) -> Any:
    """What an adapter adds to the 16 outputs of a row that stand at `place`."""
    rank, x = get_i64(record + LOW_RANK), get_i64(record + LOW) + row * get_i64(record + LOW_STRIDE)
    b, y = get_i64(record + LOW_B) + place * rank, zero()
    for column in range(rank):
        y = fma(load_f32(b + 64 * column), fill(get_f32(x + 4 * column)), y)
    return y


def block_place(block: int, pair: int) -> int:
    """Which 16 outputs a stored block of 16 rows computes; see quant.paired."""
    half = pair // 16
    if half == 0:
        return block
    within = block % (2 * half)
    return block - within + (within % 2) * half + within // 2
