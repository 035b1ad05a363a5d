"""What kernels are written over, in plain Python: the meaning of each primitive, on real addresses, a lane at a time.

An ISA's primitives (isa/_vectors.py) take the place of these when a body is compiled; the tests compare the two. Run
undecorated, a body computes with these, on any machine and slowly: a vector is an array of 16 lanes (64 bytes).
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numpy as np

LANES = 16
SMALLEST = 1e-36
VECTORS = 2
COUNT = 1
"""Rows of a dot kernel, where it is not compiled for another number."""


def _at(p: int, kind: Any, count: int) -> Any:
    """The memory at an address as an array."""
    size = np.dtype(kind).itemsize * count
    return np.frombuffer((ctypes.c_char * size).from_address(int(p)), kind)


def get_i64(p: int) -> int:
    return int(_at(p, np.int64, 1)[0])


def get_i32(p: int) -> int:
    return int(_at(p, np.int32, 1)[0])


def get_u8(p: int) -> int:
    return int(_at(p, np.uint8, 1)[0])


def get_f32(p: int) -> Any:
    return _at(p, np.float32, 1)[0]


def get_f16(p: int) -> Any:
    return np.float32(_at(p, np.float16, 1)[0])


def set_i64(p: int, x: int) -> None:
    _at(p, np.int64, 1)[0] = x


def set_i32(p: int, x: int) -> None:
    _at(p, np.int32, 1)[0] = x


def set_f32(p: int, x: Any) -> None:
    _at(p, np.float32, 1)[0] = x


def set_f16(p: int, x: Any) -> None:
    _at(p, np.float16, 1)[0] = x


def zero() -> Any:
    return np.zeros(LANES, np.float32)


def fill(x: Any) -> Any:
    return np.full(LANES, x, np.float32)


def load_bytes(p: int) -> Any:
    return _at(p, np.uint8, 4 * LANES).copy()


def load_f32(p: int) -> Any:
    return _at(p, np.float32, LANES).copy()


def load_f16(p: int) -> Any:
    return _at(p, np.float16, LANES).astype(np.float32)


def store_f32(p: int, x: Any) -> None:
    _at(p, np.float32, LANES)[:] = x


def store_f16(p: int, x: Any) -> None:
    _at(p, np.float16, LANES)[:] = x


def scatter_f16(p: int, step: int, x: Any) -> None:
    """16 float16, `step` bytes apart."""
    for i, half in enumerate(x.astype(np.float16)):
        _at(p + i * step, np.float16, 1)[0] = half


def _codes(x: Any) -> Any:
    """The nearest whole numbers, halves to even, from -127 to 127; any for NaN."""
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(x), -127, 127).astype(np.int8)


def store_codes(p: int, x: Any) -> None:
    """16 int8."""
    _at(p, np.int8, LANES)[:] = _codes(x)


def scatter_codes(p: int, step: int, x: Any) -> None:
    """16 uint8, codes + 128: four times four of them, `step` bytes apart."""
    for i, four in enumerate((_codes(x) ^ -128).view(np.uint8).reshape(4, 4)):
        _at(p + i * step, np.uint8, 4)[:] = four


def quantize_64(source: int, target: int) -> None:
    """64 float32 -> int8 [64], the nearest codes (halves to even) of 4 groups of 16 whose largest is 127; their scales,
    float32 [4]; of a group's codes, -8 and -128 times their sum, int32 [2][4]; of 32, the sum of scale * code, float32
    [2]. Groups whose largest is below SMALLEST count as 0."""
    groups = _at(source, np.float32, 64).reshape(4, 16)
    largest = np.abs(groups).max(axis=1)
    with np.errstate(all="ignore"):
        inverse = np.where(largest < SMALLEST, np.float32(0), np.float32(127) / largest)
        codes = np.rint(groups * inverse[:, None]).astype(np.int8)
    totals, scales = codes.sum(axis=1, dtype=np.int32), largest.astype(np.float64) / 127
    _at(target, np.int8, 64)[:] = codes.reshape(-1)
    _at(target + 64, np.float32, 4)[:] = scales
    _at(target + 80, np.int32, 8)[:] = *(-8 * totals), *(-128 * totals)
    sums = (scales * totals).reshape(2, 2)
    _at(target + 112, np.float32, 2)[:] = sums[:, 1] + sums[:, 0].astype(np.float32)


def splat_f32(p: int) -> Any:
    return fill(get_f32(p))


def low4(x: Any) -> Any:
    return x & 15


def high4(x: Any) -> Any:
    return x >> 4


def first2(x: Any) -> Any:
    """Eight times the lowest two bits, as of the others below."""
    return (x & 3) << 3


def second2(x: Any) -> Any:
    return (x >> 2 & 3) << 3


def third2(x: Any) -> Any:
    return (x >> 4 & 3) << 3


def fourth2(x: Any) -> Any:
    return (x >> 6) << 3


def add(x: Any, y: Any) -> Any:
    return x + y


def sub(x: Any, y: Any) -> Any:
    return x - y


def mul(x: Any, y: Any) -> Any:
    return x * y


def div(x: Any, y: Any) -> Any:
    return x / y


def fma(x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once: a product of two float32 is exact in float64."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def maximum(x: Any, y: Any) -> Any:
    return np.where(x > y, x, y)


def absolute(x: Any) -> Any:
    return np.abs(x)


def exp(x: Any) -> Any:
    """For x <= 0; 0 from -87 down; NaN for NaN."""
    return np.where(x <= -87, 0, np.exp(np.maximum(x, -87))).astype(np.float32)


def exp2(x: Any) -> Any:
    """For x <= 0, or hardly more; 0 below -126.5; NaN for NaN."""
    return np.where(x < -126.5, 0, np.exp2(np.maximum(x, -127))).astype(np.float32)


def first(count: int, x: Any, other: Any) -> Any:
    """The first `count` lanes of x, the further ones of the other."""
    return np.where(np.arange(LANES) < count, x, other)


def where_positive(x: Any, y: Any, z: Any) -> Any:
    return np.where(x > 0, y, z)


def lanes_sum(x: Any) -> Any:
    """Lane i with lane i + 8, then + 4, + 2, + 1."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def lanes_max(x: Any) -> Any:
    return x.max()


def prefetch(p: int) -> None:
    """Nothing but speed."""


def fetched_lines() -> int:
    """Lines of 64 bytes that a prefetch brings: where the CPU fetches the neighbour too, asking for it costs time."""
    return 1


def row_count() -> int:
    return COUNT


def rows_zero() -> Any:
    return np.zeros((COUNT, LANES), np.float32)


def rows_zero_ints() -> Any:
    return np.zeros((COUNT, LANES), np.int32)


def rows_start(p: int) -> Any:
    """An int32 for each row, in all lanes."""
    return np.repeat(_at(p, np.int32, COUNT)[:, None], LANES, axis=1)


def rows_dot4(acc: Any, u: Any, p: int) -> Any:
    """acc[row][lane] + four bytes of the lane times four of the row's int8."""
    codes = _at(p, np.int8, 4 * COUNT).reshape(COUNT, 1, 4).astype(np.int32)
    return acc + (u.reshape(1, LANES, 4) * codes).sum(2, dtype=np.int32)


rows_dot4_u8 = rows_dot4


def rows_scaled(dot: Any, p: int) -> Any:
    """dot * the row's float32."""
    return dot.astype(np.float32) * _at(p, np.float32, COUNT)[:, None]


def rows_add_scaled(sums: Any, dot: Any, p: int) -> Any:
    """fma(dot, the row's float32, sums)."""
    return fma(dot.astype(np.float32), _at(p, np.float32, COUNT)[:, None], sums)


def rows_add_weighted(acc: Any, w: Any, sums: Any) -> Any:
    """fma(w, sums, acc)."""
    return fma(np.broadcast_to(w, acc.shape), sums, acc)


def rows_fma(acc: Any, w: Any, p: int) -> Any:
    """fma(w, the row's float32, acc)."""
    return fma(np.broadcast_to(w, acc.shape), _at(p, np.float32, COUNT)[:, None], acc)


def store_rows(p: int, acc: Any) -> None:
    _at(p, np.float32, COUNT * LANES)[:] = acc.reshape(-1)


# Sums of some queries, VECTORS of each: name_n is of any number of them; see queries.


def vectors_n() -> int:
    return VECTORS


def zeros_n(queries: int = 1) -> Any:
    return np.zeros((queries, VECTORS, LANES), np.float32)


def load_n(p: int, step: int, queries: int = 1) -> Any:
    """Vector v of query q stands at p + q * step + 64 * v."""
    return np.stack([_at(p + q * step, np.float32, VECTORS * LANES).reshape(VECTORS, LANES) for q in range(queries)])


def store_n(p: int, step: int, sums: Any) -> None:
    for q, vectors in enumerate(sums):
        _at(p + q * step, np.float32, VECTORS * LANES)[:] = vectors.reshape(-1)


def fma_n(sums: Any, x: int, x_step: int, factor: int, factor_step: int, kind: Any = np.float16) -> Any:
    """fma(16 float16 at x + v * x_step, the float32 at factor + q * factor_step, sums[q][v])."""
    vectors = np.stack([_at(x + v * x_step, kind, LANES).astype(np.float32) for v in range(VECTORS)])
    return np.stack([fma(vectors, get_f32(factor + q * factor_step), of_query) for q, of_query in enumerate(sums)])


fma_f32_n, fma_codes_n = partial(fma_n, kind=np.float32), partial(fma_n, kind=np.int8)
"""As fma_n, of 16 float32, or int8, at x + v * x_step."""


def starts_n(p: int, step: int, queries: int = 1) -> Any:
    """The int32 at p + q * step in all lanes of a query's vectors."""
    return np.stack([np.full((VECTORS, LANES), get_i32(p + q * step), np.int32) for q in range(queries)])


def dot_n(ints: Any, x: int, x_step: int, codes: int, codes_step: int) -> Any:
    """ints[q][v] + four bytes of each lane, 64 of them at x + v * x_step, times four int8 at codes + q * codes_step."""
    u = np.stack([load_bytes(x + v * x_step).reshape(LANES, 4).astype(np.int32) for v in range(VECTORS)])
    quads = np.stack([_at(codes + q * codes_step, np.int8, 4).astype(np.int32) for q in range(len(ints))])
    return ints + (u * quads[:, None, None]).sum(3, dtype=np.int32)


def _factors(p: int, step: int, queries: int) -> Any:
    return np.array([get_f32(p + q * step) for q in range(queries)], np.float32)[:, None, None]


def scaled_n(ints: Any, p: int, step: int) -> Any:
    """ints * the float32 at p + q * step."""
    return ints.astype(np.float32) * _factors(p, step, len(ints))


def add_scaled_n(sums: Any, ints: Any, p: int, step: int) -> Any:
    """fma(ints, the float32 at p + q * step, sums)."""
    return fma(ints.astype(np.float32), _factors(p, step, len(ints)), sums)


def add_weighted_n(sums: Any, w: int, w_step: int, parts: Any) -> Any:
    """fma(16 float16 at w + v * w_step, parts[q][v], sums[q][v])."""
    weights = np.stack([load_f16(w + v * w_step) for v in range(VECTORS)])
    return fma(np.broadcast_to(weights, parts.shape), parts, sums)


vectors_1 = vectors_4 = vectors_8 = vectors_n
store_1 = store_4 = store_8 = store_n
fma_1 = fma_4 = fma_8 = fma_n
fma_f32_1 = fma_f32_4 = fma_f32_8 = fma_f32_n
fma_codes_1 = fma_codes_4 = fma_codes_8 = fma_codes_n
dot_1 = dot_4 = dot_8 = dot_n
scaled_1 = scaled_4 = scaled_8 = scaled_n
add_scaled_1 = add_scaled_4 = add_scaled_8 = add_scaled_n
add_weighted_1 = add_weighted_4 = add_weighted_8 = add_weighted_n
zeros_1, zeros_4, zeros_8 = (partial(zeros_n, n) for n in (1, 4, 8))
load_1, load_4, load_8 = (partial(load_n, queries=n) for n in (1, 4, 8))
starts_1, starts_4, starts_8 = (partial(starts_n, queries=n) for n in (1, 4, 8))


def most_queries() -> int:
    """How many the registers hold sums of."""
    return 4


def call_op(f: Any, record: int, step: int, thread: int, n_threads: int) -> None:
    f(record, step, thread, n_threads)


def call_dot(f: Any, weight: int, ahead: int, n_tiles: int, codes: int, y: int) -> None:
    f(weight, ahead, n_tiles, codes, y)


def atomic_get(p: int) -> int:
    return get_i64(p)


def atomic_set(p: int, x: int) -> None:
    set_i64(p, x)


def atomic_next(p: int) -> int:
    """Add 1 to a cell; what was in it."""
    x = get_i64(p)
    set_i64(p, x + 1)
    return x


def atomic_raise(p: int, old: int, new: int) -> None:
    """Put a new number in a cell if the old one still is in it."""
    if get_i64(p) == old:
        set_i64(p, new)


def pause() -> None:
    """Tell the core that this thread is waiting."""


def yield_cpu() -> None:
    """Let another thread have the core."""
