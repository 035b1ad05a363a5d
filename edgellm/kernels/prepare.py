"""A matmul's prologue: rows, normed or activated, become int8 codes with a scale for 16 (or stay float32).

Rows that a dot kernel takes together are interleaved, as dots.py says. What is computed for a row does not depend on
the other rows, nor on the thread.
"""

from __future__ import annotations

import math
from typing import Any

from edgellm.kernels.fetch import fetch_more, fetching
from edgellm.kernels.layout import (
    ACTIVATION,
    CODE_BYTES,
    COLS,
    GATED,
    GATHERS,
    GELU,
    GELU_TANH,
    LAYER_NORM,
    N_EXPERTS,
    N_TILES,
    NORM,
    NORM_BIAS,
    NORM_EPS,
    PLAIN,
    PROLOGUE,
    RELU2,
    RMS_NORM,
    ROUTES,
    ROWS_N,
    SOURCE,
    SOURCE_STRIDE,
    SPREADS,
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
    div,
    exp,
    fill,
    first,
    fma,
    get_f32,
    get_i32,
    get_i64,
    lanes_sum,
    load_f32,
    maximum,
    mul,
    quantize_64,
    set_f32,
    set_i32,
    store_f32,
    sub,
    where_positive,
    zero,
)  # fmt: skip


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
    cells = fetching(step, thread)
    for i in range(count):
        source = source_row(record, step, row + i)
        transform(record, get_i64(record + SOURCE) + source * get_i64(record + SOURCE_STRIDE), buffer, cells)
        if get_i64(record + CODE_BYTES) == 1:
            quantize(buffer, get_i64(record + N_TILES), packed, i, count, cells)
        else:
            for column in range(64 * get_i64(record + N_TILES)):
                set_f32(packed + 4 * (column * count + i), get_f32(buffer + 4 * column))


def source_row(record: int, step: int, row: int) -> int:
    """Which row of the source an op's row is made of: of those that are wanted, or that experts share."""
    if get_i64(record + GATHERS):
        return int(get_i32(get_i64(step + STEP_WANTED) + 4 * row))
    if get_i64(record + SPREADS):
        return int(get_i32(get_i64(record + ROUTES) + 4 * (get_i64(record + N_EXPERTS) + 1 + row)))
    return row


def transform(record: int, source: int, target: int, cells: int) -> None:
    """A row as the matrix wants it: float32, zeros up to a whole tile."""
    cols, kind = get_i64(record + COLS), get_i64(record + PROLOGUE)
    centre = fill(mean(cols, source)) if kind == LAYER_NORM else zero()
    norms = kind in (RMS_NORM, LAYER_NORM)
    factor = fill(inverse_rms(cols, source, centre, get_f32(record + NORM_EPS))) if norms else zero()
    for column in range(0, 64 * get_i64(record + N_TILES), 16):
        x = zero()
        if column % 64 == 0:
            fetch_more(cells)
        if column < cols:
            x = load_f32(source + 4 * column)
            if norms:
                x = mul(mul(sub(x, centre), factor), load_f32(get_i64(record + NORM) + 4 * column))
                if get_i64(record + NORM_BIAS):
                    x = add(x, load_f32(get_i64(record + NORM_BIAS) + 4 * column))
            elif kind != PLAIN:
                x = mul(x, gate(x, get_i64(record + ACTIVATION)))
                if kind == GATED:
                    x = mul(x, load_f32(source + 4 * (cols + column)))
            x = first(cols - column, x, zero())
        store_f32(target + 4 * column, x)


def mean(cols: int, source: int) -> Any:
    sums = zero()
    for column in range(0, cols, 16):
        sums = add(sums, first(cols - column, load_f32(source + 4 * column), zero()))
    return lanes_sum(sums) / cols


def inverse_rms(cols: int, source: int, centre: Any, eps: float) -> float:
    """1 / sqrt(mean square + eps) of a row less its centre."""
    squares = zero()
    for column in range(0, cols, 16):
        x = first(cols - column, sub(load_f32(source + 4 * column), centre), zero())
        squares = fma(x, x, squares)
    return 1.0 / math.sqrt(lanes_sum(squares) / cols + eps)


def gate(x: Any, activation: int) -> Any:
    """What an activation multiplies x by: from 0 to 1, but for squared ReLU."""
    if activation == RELU2:
        return maximum(x, zero())
    size = absolute(x)
    # Of a symmetric gate, the smaller side: exp is for what is not positive.
    if activation == GELU:
        small = normal_tail(size)
    else:
        z = size
        if activation == GELU_TANH:  # tanh is sigmoid(2 z)
            z = mul(size, fma(mul(size, size), fill(0.0713548162726), fill(1.59576912161)))
        tail = exp(sub(zero(), z))
        small = div(tail, add(tail, fill(1.0)))
    return where_positive(x, sub(fill(1.0), small), small)


def capped(x: Any, softcap: float) -> Any:
    """softcap * tanh(x / softcap), or x for a softcap of 0."""
    if softcap == 0:
        return x
    tail = exp(mul(absolute(x), fill(-2.0 / softcap)))
    y = mul(div(sub(fill(1.0), tail), add(fill(1.0), tail)), fill(softcap))
    return where_positive(x, y, sub(zero(), y))


def normal_tail(x: Any) -> Any:
    """P(normal > x) for x >= 0, within 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = div(fill(1.0), fma(x, fill(0.2316418882), fill(1.0)))
    p = fma(t, fill(1.061405429), fill(-1.453152027))
    p = fma(p, t, fill(1.421413741))
    p = fma(p, t, fill(-0.284496736))
    p = mul(mul(fma(p, t, fill(0.254829592)), t), fill(0.5))
    return mul(p, exp(mul(mul(x, x), fill(-0.5))))


def quantize(buffer: int, n_tiles: int, packed: int, row: int, count: int, cells: int) -> None:
    """One of `count` interleaved rows: float32 -> int8 with a scale for 16, whose largest value is 127."""
    codes, scales = packed + 4 * row, packed + 64 * n_tiles * count + 4 * row
    sums, starts = scales + 16 * n_tiles * count, scales + 24 * n_tiles * count
    made, further = buffer - 128, 16 * n_tiles * count
    for tile in range(n_tiles):
        fetch_more(cells)
        quantize_64(buffer + 256 * tile, made)
        spread(made, 16, codes + 64 * count * tile, count)
        spread(made + 64, 4, scales + 16 * count * tile, count)
        spread(made + 80, 4, starts + 16 * count * tile, count)
        spread(made + 96, 4, starts + further + 16 * count * tile, count)
        spread(made + 112, 2, sums + 8 * count * tile, count)


def spread(source: int, n: int, target: int, count: int) -> None:
    """4 bytes, n times, to one of `count` interleaved rows."""
    for i in range(n):
        set_i32(target + 4 * count * i, get_i32(source + 4 * i))
