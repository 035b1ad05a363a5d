"""The dot products of each weight format: 16 rows of a matrix with some rows of activations, written once for all ISAs.

Every body has the signature dot(weight, n_tiles, codes, scales, sums, starts, y) and writes 16 outputs for each of
row_count() rows to y, [row][16] float32. `weight` is the first tile of a block of 16 rows. The activations of the
rows are interleaved (see kernels.prepare):

    codes    int8    [columns / 4][row][4]; float32 [column][row] for the formats that are not quantized
    scales   float32 [columns / 16][row]
    sums     float32 [columns / 32][row], of scale * code over 32 columns
    starts   int32   [columns / 16][row], -8 * sum of the codes, which is where a q4 dot product starts: so its codes
             0..15 count as -8..7; after these q8's, -128 * sum

Weights have a scale for 32 columns, activations one for 16: with 32 the perplexity of SmolLM2 grew by 0.48 %.

Exactness: the integer sum of 16 columns is exact; then acc = fma(sum, weight scale * activation scale, acc), in
ascending order, one accumulator for an output. So an output does not depend on how many rows are computed together.
"""

from __future__ import annotations

from edgellm.kernels.primitives import (
    high4,
    load_bytes,
    load_f16,
    load_f32,
    low4,
    prefetch,
    row_count,
    rows_dot4,
    rows_dot4_u8,
    rows_fma,
    rows_scale_add,
    rows_start,
    rows_zero,
    rows_zero_ints,
    store_rows,
)  # fmt: skip

AHEAD = 4096
"""Bytes that weights are fetched before they are used: worth a factor of two in bandwidth."""


def q4(weight: int, n_tiles: int, codes: int, scales: int, sums: int, starts: int, y: int) -> None:
    rows = row_count()
    acc = rows_zero()
    for _ in range(n_tiles):
        for group in range(2):
            for line in range(group * 5, group * 4 + 5):
                prefetch(weight + AHEAD + line * 64)
            scale = load_f16(weight + 512 + group * 32)
            for half in range(2):
                dot = rows_start(starts)
                for j in range(2):
                    w = load_bytes(weight + group * 256 + half * 128 + j * 64)
                    dot = rows_dot4(dot, low4(w), codes)
                    dot = rows_dot4(dot, high4(w), codes + rows * 4)
                    codes += rows * 8
                acc = rows_scale_add(acc, dot, scale, scales)
                scales += rows * 4
                starts += rows * 4
        weight += 576
    store_rows(y, acc)


def q4m(weight: int, n_tiles: int, codes: int, scales: int, sums: int, starts: int, y: int) -> None:
    rows = row_count()
    acc = rows_zero()
    for _ in range(n_tiles):
        for group in range(2):
            for line in range(group * 5, group * 5 + 5):
                prefetch(weight + AHEAD + line * 64)
            scale = load_f16(weight + 512 + group * 32)
            for half in range(2):
                dot = rows_zero_ints()
                for j in range(2):
                    w = load_bytes(weight + group * 256 + half * 128 + j * 64)
                    dot = rows_dot4(dot, low4(w), codes)
                    dot = rows_dot4(dot, high4(w), codes + rows * 4)
                    codes += rows * 8
                acc = rows_scale_add(acc, dot, scale, scales)
                scales += rows * 4
            acc = rows_fma(acc, load_f16(weight + 576 + group * 32), sums)
            sums += rows * 4
        weight += 640
    store_rows(y, acc)


def q8(weight: int, n_tiles: int, codes: int, scales: int, sums: int, starts: int, y: int) -> None:
    rows = row_count()
    acc = rows_zero()
    starts += 16 * n_tiles * rows
    for _ in range(n_tiles):
        for group in range(2):
            scale = load_f16(weight + 1024 + group * 32)
            for half in range(2):
                dot = rows_start(starts)
                for j in range(4):
                    w = load_bytes(weight + group * 512 + half * 256 + j * 64)
                    prefetch(weight + AHEAD + group * 512 + half * 256 + j * 64)
                    dot = rows_dot4_u8(dot, w, codes)
                    codes += rows * 4
                acc = rows_scale_add(acc, dot, scale, scales)
                scales += rows * 4
                starts += rows * 4
        prefetch(weight + AHEAD + 1024)
        weight += 1088
    store_rows(y, acc)


def f16(weight: int, n_tiles: int, codes: int, scales: int, sums: int, starts: int, y: int) -> None:
    rows = row_count()
    acc = rows_zero()
    for _ in range(n_tiles):
        for _column in range(64):
            prefetch(weight + AHEAD)
            acc = rows_fma(acc, load_f16(weight), codes)
            codes += rows * 4
            weight += 32
    store_rows(y, acc)


def f32(weight: int, n_tiles: int, codes: int, scales: int, sums: int, starts: int, y: int) -> None:
    rows = row_count()
    acc = rows_zero()
    for _ in range(n_tiles):
        for _column in range(64):
            prefetch(weight + AHEAD)
            acc = rows_fma(acc, load_f32(weight), codes)
            codes += rows * 4
            weight += 64
    store_rows(y, acc)
