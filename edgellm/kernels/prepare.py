"""A matmul's prologue: rows of activations, normed or gated, become int8 codes with a scale for 16 (or stay float32).

Rows that a dot kernel takes together are interleaved, as dots.py says. What is computed for a row does not depend on
the other rows, nor on the thread.
"""

from __future__ import annotations

import math
from typing import Any

from edgellm.kernels.layout import (
    CODE_BYTES,
    COLS,
    GATHERS,
    N_TILES,
    NORM,
    NORM_BIAS,
    NORM_EPS,
    PROLOGUE,
    ROWS_N,
    SOURCE,
    SOURCE_STRIDE,
    STEP_N_WANTED,
    STEP_PACKED,
    STEP_ROWS,
    STEP_SCRATCH,
    STEP_SCRATCH_BYTES,
    STEP_WANTED,
)  # fmt: skip
from edgellm.kernels.primitives import (
    absolute,
    add,
    codes_sum,
    div,
    exp,
    fill,
    first,
    fma,
    get_f32,
    get_i32,
    get_i64,
    lanes_largest,
    lanes_sum,
    load_f32,
    mul,
    set_f32,
    set_i32,
    store_codes,
    store_f32,
    sub,
    where_positive,
    zero,
)  # fmt: skip

SMALLEST = 1e-36
"""Activations that are all closer to 0 count as 0."""


def rows_of(record: int, step: int) -> int:
    """Rows that an op works on: the step's, or those whose logits are wanted."""
    if get_i64(record + GATHERS):
        return get_i64(step + STEP_N_WANTED)
    return get_i64(step + STEP_ROWS)


def rows_together(rows_left: int, most: int) -> int:
    """How many rows the next dot kernel takes: `most`, 4 or 1."""
    if rows_left >= most:
        return most
    return 4 if rows_left >= 4 else 1


def packed_bytes(record: int) -> int:
    """Bytes of one prepared row: the codes, and what dots.py lists besides."""
    return get_i64(record + N_TILES) * (64 * get_i64(record + CODE_BYTES) + 56)


def prepare(record: int, step: int, thread: int, n_threads: int) -> None:
    """The op for several rows: each thread prepares some of them. A single row each thread prepares for itself."""
    rows, most = rows_of(record, step), get_i64(record + ROWS_N)
    if rows == 1:
        return
    row, turn = 0, 0
    while row < rows:
        count = rows_together(rows - row, most)
        if turn % n_threads == thread:
            prepare_rows(record, step, thread, row, count, get_i64(step + STEP_PACKED) + row * packed_bytes(record))
        row += count
        turn += 1


def prepare_rows(record: int, step: int, thread: int, row: int, count: int, packed: int) -> None:
    """`count` rows from `row` on, interleaved, to `packed`."""
    buffer = get_i64(step + STEP_SCRATCH) + thread * get_i64(step + STEP_SCRATCH_BYTES) + 4096
    for i in range(count):
        source = row + i
        if get_i64(record + GATHERS):
            source = int(get_i32(get_i64(step + STEP_WANTED) + 4 * source))
        transform(record, get_i64(record + SOURCE) + source * get_i64(record + SOURCE_STRIDE), buffer)
        if get_i64(record + CODE_BYTES) == 1:
            quantize(buffer, get_i64(record + N_TILES), packed, i, count)
        else:
            for column in range(64 * get_i64(record + N_TILES)):
                set_f32(packed + 4 * (column * count + i), get_f32(buffer + 4 * column))


def transform(record: int, source: int, target: int) -> None:
    """A row as the matrix wants it: float32, zeros up to a whole tile."""
    cols, kind = get_i64(record + COLS), get_i64(record + PROLOGUE)
    centre = fill(mean(record, source)) if kind == 4 else zero()
    factor = fill(inverse_rms(record, source, centre)) if kind == 1 or kind == 4 else zero()
    for column in range(0, 64 * get_i64(record + N_TILES), 16):
        x = zero()
        if column < cols:
            at = source + 4 * column
            if kind == 0:
                x = load_f32(at)
            elif kind == 1:
                x = mul(mul(load_f32(at), factor), load_f32(get_i64(record + NORM) + 4 * column))
            elif kind == 4:
                x = mul(mul(sub(load_f32(at), centre), factor), load_f32(get_i64(record + NORM) + 4 * column))
                x = add(x, load_f32(get_i64(record + NORM_BIAS) + 4 * column))
            else:
                x = mul(gated(load_f32(at), kind), load_f32(at + 4 * cols))
            x = first(cols - column, x, zero())
        store_f32(target + 4 * column, x)


def mean(record: int, source: int) -> Any:
    cols, sums = get_i64(record + COLS), zero()
    for column in range(0, cols, 16):
        sums = add(sums, first(cols - column, load_f32(source + 4 * column), zero()))
    return lanes_sum(sums) / cols


def inverse_rms(record: int, source: int, centre: Any) -> float:
    """1 / sqrt(mean square + eps) of a row less its centre."""
    cols, squares = get_i64(record + COLS), zero()
    for column in range(0, cols, 16):
        x = first(cols - column, sub(load_f32(source + 4 * column), centre), zero())
        squares = fma(x, x, squares)
    return 1.0 / math.sqrt(lanes_sum(squares) / cols + get_f32(record + NORM_EPS))


def gated(x: Any, kind: int) -> Any:
    """SiLU, or GELU by tanh: x * sigmoid(z), with z = x or 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    z = x
    if kind == 3:
        z = mul(x, fma(mul(x, x), fill(0.0713548162726), fill(1.59576912161)))
    # exp is for what is not positive: sigmoid(z) = 1 / (1 + e^-|z|), or 1 less that.
    tail = exp(sub(zero(), absolute(z)))
    small = div(tail, add(tail, fill(1.0)))
    return mul(x, where_positive(z, sub(fill(1.0), small), small))


def quantize(buffer: int, n_tiles: int, packed: int, row: int, count: int) -> None:
    """One of `count` interleaved rows: float32 -> int8 with a scale for 16, whose largest value is 127."""
    codes, scales = packed + 4 * row, packed + 64 * n_tiles * count + 4 * row
    sums, starts = scales + 16 * n_tiles * count, scales + 24 * n_tiles * count
    for group in range(4 * n_tiles):
        x = load_f32(buffer + 64 * group)
        largest = lanes_largest(x)
        # Of what is smaller the reciprocal is infinite; NaN takes the first branch.
        store_codes(buffer - 64, mul(x, fill(0.0 if largest < SMALLEST else 127.0 / largest)))
        for four in range(4):
            set_i32(codes + 4 * count * (4 * group + four), get_i32(buffer - 64 + 4 * four))
        total, at = codes_sum(buffer - 64), 4 * count * group
        set_f32(scales + at, largest / 127.0)
        set_i32(starts + at, -8 * total)
        set_i32(starts + at + 16 * n_tiles * count, -128 * total)
        both = sums + 4 * count * (group // 2)
        set_f32(both, largest / 127.0 * total + (get_f32(both) if group % 2 else 0.0))
