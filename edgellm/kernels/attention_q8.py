"""Attention over a cache of int8: half the memory of float16, and less of it to read for each token.

A key is a row of the weight format q8: codes with a float16 scale for GROUP dimensions. Queries become int8 too, with
a scale for 16 dimensions as activations do, so that scores are the integer dot products of dots.q8, with 16 keys for
16 rows of a matrix: the same operations in the same order. A value has one scale, by which its weight is multiplied.

    value = float32(scale) * code,  scale = float16(largest / 127),  code = nearest(value / scale), from -127 to 127

A scale is NaN where one of its values is not finite. The functions here take the place of attention's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.kernels.attention_block import ACC, MADE, SCORES, padded_bytes, query_at
from edgellm.kernels.layout import KEY_BLOCK
from edgellm.kernels.primitives import (
    absolute,
    add,
    add_scaled_n,
    add_weighted_n,
    div,
    dot_n,
    fill,
    first,
    fma_codes_n,
    get_f16,
    lanes_max,
    lanes_sum,
    load_f16,
    load_f32,
    load_n,
    maximum,
    mul,
    prefetch,
    quantize_64,
    scaled_n,
    scatter_codes,
    set_f16,
    starts_n,
    store_codes,
    store_f32,
    store_n,
    vectors_n,
    zero,
    zeros_n,
)  # fmt: skip
from edgellm.kernels.queries import for_each_number

GROUP = 32
TILE, TILE_SCALES, TILE_STARTS = 128, 64, 96  # of what quantize_64 makes of 64 dimensions of a query


def width(head_dim: int) -> int:
    """Codes of a head, with room for whole vectors."""
    return (head_dim + 15) // 16 * 16


def key_bytes(head_dim: int) -> int:
    """Of a block's keys: codes, then for each group the scales."""
    return KEY_BLOCK * (width(head_dim) + 2 * ((head_dim + GROUP - 1) // GROUP))


def block_bytes(head_dim: int) -> int:
    """Of a block's keys, and of its values, which stand behind them."""
    return key_bytes(head_dim) + KEY_BLOCK * (width(head_dim) + 2)


def keep_vector(query: int, source: int, head_dim: int) -> None:
    """Quantize what scores are computed from; on the way it stands where a partial comes to stand later."""
    room = query + MADE + ACC
    for d in range(0, padded_bytes(head_dim) // 4, 16):
        store_f32(room + 4 * d, first(head_dim - d, load_f32(source + 4 * d), zero()) if d < head_dim else zero())
    for d in range(0, head_dim, 64):
        quantize_64(room + 4 * d, query + query_at(head_dim) + 2 * d)


def score_n(keys: int, ahead: int, head_dim: int, begin: int, end: int, query: int, stride: int) -> None:
    """q . k of some queries with keys begin..end, and some around them."""
    n, cols = 16 * vectors_n(), width(head_dim)
    step, scales = 16 * cols, keys + KEY_BLOCK * cols
    for key in range(begin // n * n, end, n):
        s = zeros_n()
        for d in range(0, cols, GROUP):
            k, w = keys + key * cols + 16 * d, scales + 2 * (KEY_BLOCK * (d // GROUP) + key)
            q = query + query_at(head_dim) + d // 64 * TILE
            codes, factors, starts = q + d % 64, q + TILE_SCALES + d % 64 // 4, q + TILE_STARTS + d % 64 // 4
            prefetch(w + ahead)
            dots = starts_n(starts, stride)
            for i in range(4):
                for v in range(vectors_n()):
                    prefetch(k + 64 * i + v * step + ahead)
                dots = dot_n(dots, k + 64 * i, step, codes + 4 * i, stride)
            sums = scaled_n(dots, factors, stride)
            if d + 16 < cols:
                dots = starts_n(starts + 4, stride)
                for i in range(4, 8):
                    for v in range(vectors_n()):
                        prefetch(k + 64 * i + v * step + ahead)
                    dots = dot_n(dots, k + 64 * i, step, codes + 4 * i, stride)
                sums = add_scaled_n(sums, dots, factors + 4, stride)
            s = add_weighted_n(s, w, 32, sums)
        store_n(query + SCORES + 4 * key, stride, s)


def of_value(weight: Any, values: int, head_dim: int, key: int) -> Any:
    """Weights times the scales of 16 values, from this one on."""
    return mul(weight, load_f16(values + KEY_BLOCK * width(head_dim) + 2 * key))


def weigh_n(values: int, ahead: int, head_dim: int, begin: int, end: int, query: int, stride: int) -> None:
    """Add weight * value for keys begin..end of a block to the partials of some queries."""
    weights, n, cols = query + SCORES, 16 * vectors_n(), width(head_dim)
    for d in range(0, head_dim, n):
        acc = query + MADE + ACC + 4 * d
        s = load_n(acc, stride)
        for key in range(begin, end):
            prefetch(values + ahead + KEY_BLOCK * d + n * key)
            s = fma_codes_n(s, values + key * cols + d, 16, weights + 4 * key, stride)
        store_n(acc, stride, s)


def score_8(keys: int, ahead: int, head_dim: int, begin: int, end: int, query: int, stride: int) -> None:
    """In halves: a vector of scores takes three registers."""
    score_4(keys, ahead, head_dim, begin, end, query, stride)
    score_4(keys, ahead, head_dim, begin, end, query + 4 * stride, stride)


score_1, score_4, _ = for_each_number(score_n)
weigh_1, weigh_4, weigh_8 = for_each_number(weigh_n)


def task_queries() -> int:
    """As many as the nearest cache holds."""
    return 16


def in_pieces(n: int) -> bool:
    """Never: products of keys are those of codes."""
    return False


# The cache.


def append_key(keys: int, kv_head: int, head_dim: int, capacity: int, position: int, source: int) -> None:
    """Store head_dim float32 as a key of a layer's keys, which start at `keys`."""
    block, key = block_of(keys, kv_head, head_dim, capacity, position), position % KEY_BLOCK
    target = block + key // 16 * 16 * width(head_dim) + key % 16 * 4
    scales = block + KEY_BLOCK * width(head_dim) + 2 * key
    for d in range(0, head_dim, GROUP):
        low, high = part(source, d, head_dim), part(source, d + 16, head_dim)
        at = scales + 2 * KEY_BLOCK * (d // GROUP)
        set_f16(at, scale_of(maximum(absolute(low), absolute(high)), add(low, high)))
        scatter_codes(target + 16 * d, 64, over(low, get_f16(at)))
        if d + 16 < head_dim:
            scatter_codes(target + 16 * d + 256, 64, over(high, get_f16(at)))


def append_value(values: int, kv_head: int, head_dim: int, capacity: int, position: int, source: int) -> None:
    block, key = block_of(values, kv_head, head_dim, capacity, position), position % KEY_BLOCK
    sizes, total = zero(), zero()
    for d in range(0, head_dim, 16):
        sizes = maximum(sizes, absolute(part(source, d, head_dim)))
        total = add(total, part(source, d, head_dim))
    at = block + KEY_BLOCK * width(head_dim) + 2 * key
    set_f16(at, scale_of(sizes, total))
    for d in range(0, head_dim, 16):
        store_codes(block + key * width(head_dim) + d, over(part(source, d, head_dim), get_f16(at)))


def block_of(start: int, kv_head: int, head_dim: int, capacity: int, position: int) -> int:
    number = kv_head * (capacity // KEY_BLOCK) + position % capacity // KEY_BLOCK
    return start + number * block_bytes(head_dim)


def part(source: int, d: int, head_dim: int) -> Any:
    """16 of a head's float32, and zeros where it ends."""
    return first(head_dim - d, load_f32(source + 4 * d), zero()) if d < head_dim else zero()


def scale_of(sizes: Any, total: Any) -> Any:
    """For lanes of such sizes; a maximum may pass over NaN, a sum does not."""
    return lanes_max(sizes) / np.float32(127) + lanes_sum(mul(total, zero()))


def over(x: Any, scale: Any) -> Any:
    """x / scale, 0 for a scale of 0."""
    return div(x, fill(scale)) if scale != 0 else zero()
