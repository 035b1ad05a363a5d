"""A matrix times the rows of a step: the dot kernels block by block, their outputs stored or added."""

from __future__ import annotations

from edgellm.kernels.layout import (
    ADDS,
    CODE_BYTES,
    DOT_1,
    DOT_4,
    DOT_N,
    GATHERS,
    N_BLOCKS,
    N_TILES,
    PAIR,
    ROWS_N,
    SAME_INPUT,
    STEP_LOGITS,
    STEP_PACKED,
    STEP_SCRATCH,
    STEP_SCRATCH_BYTES,
    TARGET,
    TARGET_STRIDE,
    TILE_BYTES,
    WEIGHT,
)  # fmt: skip
from edgellm.kernels.prepare import packed_bytes, prepare_rows, rows_of, rows_together
from edgellm.kernels.primitives import add, call_dot, get_i64, load_f32, store_f32


def matmul(record: int, step: int, thread: int, n_threads: int) -> None:
    """The op: each thread takes a run of blocks of 16 outputs, for all rows."""
    rows, n_blocks = rows_of(record, step), get_i64(record + N_BLOCKS)
    scratch = get_i64(step + STEP_SCRATCH) + thread * get_i64(step + STEP_SCRATCH_BYTES)
    packed = get_i64(step + STEP_PACKED)
    if rows == 1:
        packed = scratch + get_i64(step + STEP_SCRATCH_BYTES) // 2
        if not get_i64(record + SAME_INPUT):
            prepare_rows(record, step, thread, 0, 1, packed)
    target = get_i64(step + STEP_LOGITS) if get_i64(record + GATHERS) else get_i64(record + TARGET)
    for block in range(n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads):
        block_times_rows(record, target, block, rows, packed, scratch)


def block_times_rows(record: int, target: int, block: int, rows: int, packed: int, outputs: int) -> None:
    """16 outputs for every row. The weights are read from memory once, and for more rows from the first cache."""
    n_tiles, stride, row = get_i64(record + N_TILES), get_i64(record + TARGET_STRIDE), 0
    weight = get_i64(record + WEIGHT) + block * n_tiles * get_i64(record + TILE_BYTES)
    target += 64 * block_place(block, get_i64(record + PAIR))
    row_bytes, code_bytes = packed_bytes(record), 64 * n_tiles * get_i64(record + CODE_BYTES)
    while row < rows:
        count = rows_together(rows - row, get_i64(record + ROWS_N))
        codes = packed + row * row_bytes
        scales = codes + count * code_bytes
        sums = scales + 16 * n_tiles * count
        call_dot(kernel(record, count), weight, n_tiles, codes, scales, sums, sums + 8 * n_tiles * count, outputs)
        for i in range(count):
            at, y = target + (row + i) * stride, load_f32(outputs + 64 * i)
            if get_i64(record + ADDS):
                y = add(load_f32(at), y)
            store_f32(at, y)
        row += count


def kernel(record: int, count: int) -> int:
    if count == 1:
        return get_i64(record + DOT_1)
    return get_i64(record + DOT_4) if count == 4 else get_i64(record + DOT_N)


def block_place(block: int, pair: int) -> int:
    """Which 16 outputs a stored block of 16 rows computes; see quant.paired."""
    half = pair // 16
    if half == 0:
        return block
    within = block % (2 * half)
    return block - within + (within % 2) * half + within // 2
