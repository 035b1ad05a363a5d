"""The dot products of each weight format: 16 rows of a matrix with some rows of activations, written once for all ISAs.

Every body has the signature dot(weight, ahead, n_tiles, codes, y) and writes 16 outputs for each of row_count() rows to
y, [row][16] float32. `weight` is the first tile of a block of 16 rows. Meanwhile it fetches what stands `ahead` bytes
from it: the weights that the thread reads next. The activations of the rows are interleaved (see kernels.prepare), one
array after the other:

    codes    int8    [columns / 4][row][4]; float32 [column][row] for the formats that are not quantized, and no more
    scales   float32 [columns / 16][row]
    sums     float32 [columns / 32][row], of scale * code over 32 columns
    starts   int32   [columns / 16][row], -8 * sum of the codes, which is where a q4 dot product starts: so its codes
             0..15 count as -8..7; after these q8's, -128 * sum

Weights have a scale for 32 columns, activations one for 16: with 32 the perplexity of SmolLM2 grew by 0.48 %.

Exactness: the integer sum of 16 columns is exact; those of 32 add up to
    s = fma(second sum, its activation scale, first sum * its activation scale)
and acc = fma(weight scale, s, acc), in ascending order, one accumulator for an output. So an output does not depend on
how many rows are computed together.
"""

from __future__ import annotations

from edgellm.kernels.primitives import (
    fetched_lines,
    fill,
    first2,
    fourth2,
    high4,
    load_bytes,
    load_f16,
    load_f32,
    low4,
    mul,
    prefetch,
    row_count,
    rows_add_scaled,
    rows_add_weighted,
    rows_dot4,
    rows_dot4_u8,
    rows_fma,
    rows_scaled,
    rows_start,
    rows_zero,
    rows_zero_ints,
    second2,
    store_rows,
    third2,
)  # fmt: skip


def q2t(weight: int, ahead: int, n_tiles: int, codes: int, y: int) -> None:
    """Eight times a code, from a start of -8 * sum: codes 0..2 count as -8..8, and an eighth of the scale is exact."""
    rows = row_count()
    scales = codes + 64 * n_tiles * rows
    starts = scales + 24 * n_tiles * rows
    acc = rows_zero()
    for _ in range(n_tiles):
        for line in range(0, 5, fetched_lines()):
            prefetch(weight + ahead + line * 64)
        for group in range(2):
            w = load_bytes(weight + group * 128)
            dot = rows_dot4(rows_start(starts), first2(w), codes)
            dot = rows_dot4(dot, second2(w), codes + rows * 4)
            dot = rows_dot4(dot, third2(w), codes + rows * 8)
            dot = rows_dot4(dot, fourth2(w), codes + rows * 12)
            sums = rows_scaled(dot, scales)
            w = load_bytes(weight + group * 128 + 64)
            dot = rows_dot4(rows_start(starts + rows * 4), first2(w), codes + rows * 16)
            dot = rows_dot4(dot, second2(w), codes + rows * 20)
            dot = rows_dot4(dot, third2(w), codes + rows * 24)
            dot = rows_dot4(dot, fourth2(w), codes + rows * 28)
            sums = rows_add_scaled(sums, dot, scales + rows * 4)
            acc = rows_add_weighted(acc, mul(load_f16(weight + 256 + group * 32), fill(0.125)), sums)
            codes += rows * 32
            scales += rows * 8
            starts += rows * 8
        weight += 320
    store_rows(y, acc)


def q4(weight: int, ahead: int, n_tiles: int, codes: int, y: int) -> None:
    rows = row_count()
    scales = codes + 64 * n_tiles * rows
    starts = scales + 24 * n_tiles * rows
    acc = rows_zero()
    for _ in range(n_tiles):
        for line in range(0, 9, fetched_lines()):
            prefetch(weight + ahead + line * 64)
        for group in range(2):
            dot = rows_start(starts)
            for j in range(2):
                w = load_bytes(weight + group * 256 + j * 64)
                dot = rows_dot4(dot, low4(w), codes)
                dot = rows_dot4(dot, high4(w), codes + rows * 4)
                codes += rows * 8
            sums = rows_scaled(dot, scales)
            dot = rows_start(starts + rows * 4)
            for j in range(2, 4):
                w = load_bytes(weight + group * 256 + j * 64)
                dot = rows_dot4(dot, low4(w), codes)
                dot = rows_dot4(dot, high4(w), codes + rows * 4)
                codes += rows * 8
            sums = rows_add_scaled(sums, dot, scales + rows * 4)
            acc = rows_add_weighted(acc, load_f16(weight + 512 + group * 32), sums)
            scales += rows * 8
            starts += rows * 8
        weight += 576
    store_rows(y, acc)


def q4m(weight: int, ahead: int, n_tiles: int, codes: int, y: int) -> None:
    rows = row_count()
    scales = codes + 64 * n_tiles * rows
    activations = scales + 16 * n_tiles * rows
    acc = rows_zero()
    for _ in range(n_tiles):
        for line in range(0, 10, fetched_lines()):
            prefetch(weight + ahead + line * 64)
        for group in range(2):
            dot = rows_zero_ints()
            for j in range(2):
                w = load_bytes(weight + group * 256 + j * 64)
                dot = rows_dot4(dot, low4(w), codes)
                dot = rows_dot4(dot, high4(w), codes + rows * 4)
                codes += rows * 8
            sums = rows_scaled(dot, scales)
            dot = rows_zero_ints()
            for j in range(2, 4):
                w = load_bytes(weight + group * 256 + j * 64)
                dot = rows_dot4(dot, low4(w), codes)
                dot = rows_dot4(dot, high4(w), codes + rows * 4)
                codes += rows * 8
            sums = rows_add_scaled(sums, dot, scales + rows * 4)
            acc = rows_add_weighted(acc, load_f16(weight + 512 + group * 32), sums)
            acc = rows_fma(acc, load_f16(weight + 576 + group * 32), activations)
            scales += rows * 8
            activations += rows * 4
        weight += 640
    store_rows(y, acc)


def q8(weight: int, ahead: int, n_tiles: int, codes: int, y: int) -> None:
    rows = row_count()
    scales = codes + 64 * n_tiles * rows
    starts = scales + 40 * n_tiles * rows
    acc = rows_zero()
    for _ in range(n_tiles):
        for line in range(0, 17, fetched_lines()):
            prefetch(weight + ahead + line * 64)
        for group in range(2):
            dot = rows_start(starts)
            for j in range(4):
                dot = rows_dot4_u8(dot, load_bytes(weight + group * 512 + j * 64), codes)
                codes += rows * 4
            sums = rows_scaled(dot, scales)
            dot = rows_start(starts + rows * 4)
            for j in range(4, 8):
                dot = rows_dot4_u8(dot, load_bytes(weight + group * 512 + j * 64), codes)
                codes += rows * 4
            sums = rows_add_scaled(sums, dot, scales + rows * 4)
            acc = rows_add_weighted(acc, load_f16(weight + 1024 + group * 32), sums)
            scales += rows * 8
            starts += rows * 8
        weight += 1088
    store_rows(y, acc)


def f16(weight: int, ahead: int, n_tiles: int, codes: int, y: int) -> None:
    rows = row_count()
    acc = rows_zero()
    for _ in range(32 * n_tiles):
        prefetch(weight + ahead)
        acc = rows_fma(acc, load_f16(weight), codes)
        acc = rows_fma(acc, load_f16(weight + 32), codes + rows * 4)
        codes += rows * 8
        weight += 64
    store_rows(y, acc)


def f32(weight: int, ahead: int, n_tiles: int, codes: int, y: int) -> None:
    rows = row_count()
    acc = rows_zero()
    for _ in range(64 * n_tiles):
        prefetch(weight + ahead)
        acc = rows_fma(acc, load_f32(weight), codes)
        codes += rows * 4
        weight += 64
    store_rows(y, acc)
