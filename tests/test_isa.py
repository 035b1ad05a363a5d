"""Every primitive on every ISA that this CPU runs, against NumPy."""
# ruff: noqa: F821  the bodies' names are an ISA's primitives

from __future__ import annotations

import itertools
from functools import cache
from types import FunctionType

import numpy as np
import pytest

pytest.importorskip("numba")

from edgellm import isa
from edgellm.errors import BackendError
from edgellm.isa import _host
from edgellm.isa import _vectors as vectors
from edgellm.isa._llvm import LANES
from edgellm.isa._vectors import primitives, row_primitives
from edgellm.kernels import primitives as plain
from edgellm.kernels.queries import AT_ONCE, for_each_number

PAIRWISE = ("add", "sub", "mul", "div", "maximum")
FLOATS = (*PAIRWISE, "fma", "absolute", "exp", "where_positive", "zero", "fill", "splat_f32")


# Bodies.


def dots(n, tiles, codes, starts, out):
    """Of n tiles of 64 bytes, with 4 codes each: the dot products of the bytes, their low and their high nibbles."""
    for i in range(n):
        u, s, start = load_bytes(tiles + 64 * i), splat_i32(codes + 4 * i), splat_i32(starts + 4 * i)
        store_f32(out + 192 * i, to_f32(dot4_u8(start, u, s)))
        store_f32(out + 192 * i + 64, to_f32(dot4(start, low4(u), s)))
        store_f32(out + 192 * i + 128, to_f32(dot4(zero_i32(), high4(u), s)))


def pairs_of_bits(n, tiles, codes, out):
    """Of n tiles of 64 bytes: the dot products of 8 times each two bits."""
    for i in range(n):
        u, s = load_bytes(tiles + 64 * i), splat_i32(codes + 4 * i)
        store_f32(out + 256 * i, to_f32(dot4(zero_i32(), first2(u), s)))
        store_f32(out + 256 * i + 64, to_f32(dot4(zero_i32(), second2(u), s)))
        store_f32(out + 256 * i + 128, to_f32(dot4(zero_i32(), third2(u), s)))
        store_f32(out + 256 * i + 192, to_f32(dot4(zero_i32(), fourth2(u), s)))


def floats(n, x, y, z, out):
    """Of n vectors: the results of FLOATS, in that order."""
    for i in range(n):
        a, b, c = load_f32(x + 64 * i), load_f32(y + 64 * i), load_f32(z + 64 * i)
        prefetch(x + 64 * i + 64)
        store_f32(out, add(a, b))
        store_f32(out + 64, sub(a, b))
        store_f32(out + 128, mul(a, b))
        store_f32(out + 192, div(a, b))
        store_f32(out + 256, maximum(a, b))
        store_f32(out + 320, fma(a, b, c))
        store_f32(out + 384, absolute(a))
        store_f32(out + 448, exp(a))
        store_f32(out + 512, where_positive(a, b, c))
        store_f32(out + 576, zero())
        store_f32(out + 640, fill(get_f32(y + 64 * i)))
        store_f32(out + 704, splat_f32(z + 64 * i))
        out += 768


def powers(n, x, out):
    for i in range(n):
        store_f32(out + 64 * i, exp2(load_f32(x + 64 * i)))


def folds(n, x, sums, maxima):
    """Of n vectors: their sum and maximum."""
    for i in range(n):
        a = load_f32(x + 64 * i)
        set_f32(sums + 4 * i, lanes_sum(a))
        set_f32(maxima + 4 * i, lanes_max(a))


def codes(n, x, out):
    """Of n times 64 float32: what stands for them, in 120 bytes."""
    for i in range(n):
        quantize_64(x + 256 * i, out + 120 * i)


def sums_n(n, x, factors, out, counts):
    """For some queries: n products of vectors and factors added up, from 0, then from these sums."""
    sums = zeros_n()
    for _ in range(2):
        for i in range(n):
            sums = fma_n(sums, x + 2 * i, 2 * n + 32, factors + 4 * i, 4 * n)
        store_n(out, 512, sums)
        sums = load_n(out, 512)
    set_i64(counts, vectors_n())
    set_i64(counts + 8, most_queries())


def code_sums_n(n, x, codes, factors, halves, wide, out):
    """For some queries: of n times 64 bytes with 4 codes each, the dot products from a start, scaled, added and
    weighted; then n products of vectors of codes and factors, and of float32 and factors."""
    sums = zeros_n()
    for i in range(n):
        p, c, f, h = x + 64 * i, codes + 4 * i, factors + 4 * i, halves + 32 * i
        part = scaled_n(dot_n(starts_n(c, 4 * n), p, 64, c, 4 * n), f, 4 * n)
        part = add_scaled_n(part, dot_n(starts_n(c, 4 * n), p, 128, c, 4 * n), f, 4 * n)
        sums = add_weighted_n(sums, h, 32, part)
        sums = fma_codes_n(sums, p, 16, f, 4 * n)
        sums = fma_f32_n(sums, wide + 64 * i, 64, f, 4 * n)
    store_n(out, 512, sums)


SUMS, CODE_SUMS = (dict(zip(AT_ONCE, for_each_number(body), strict=True)) for body in (sums_n, code_sums_n))


def nearest_codes(n, x, stored, scattered):
    """16 n float32 to int8, and with 128 added four at a time, those n apart."""
    for i in range(n):
        store_codes(stored + 16 * i, load_f32(x + 64 * i))
        scatter_codes(scattered + 4 * i, 4 * n, load_f32(x + 64 * i))


def firsts(x, y, out):
    """The first 0 to 16 lanes of x, the others of y."""
    for count in range(17):
        store_f32(out + 64 * count, first(count, load_f32(x), load_f32(y)))


def halves(n, x, vector, scattered, scalar):
    """16 n float32 to float16, as vectors, also with the lanes n apart, and one by one."""
    for i in range(n):
        store_f16(vector + 32 * i, load_f32(x + 64 * i))
        scatter_f16(scattered + 2 * i, 2 * n, load_f32(x + 64 * i))
    for i in range(16 * n):
        set_f16(scalar + 2 * i, get_f32(x + 4 * i))


def singles(n, x, vector, scalar):
    """16 n float16 to float32, as vectors and one by one."""
    for i in range(n):
        store_f32(vector + 64 * i, load_f16(x + 32 * i))
    for i in range(16 * n):
        set_f32(scalar + 4 * i, get_f16(x + 2 * i))


def scalars(x, out):
    """Copies of 8, 4 and 4 bytes, the ninth byte as a number, and the lines that a prefetch brings."""
    set_i64(out, get_i64(x))
    set_i32(out + 8, get_i32(x + 8))
    set_f32(out + 12, get_f32(x + 12))
    set_i64(out + 16, get_u8(x + 8))
    set_i64(out + 24, fetched_lines())


BODIES = (
    dots, pairs_of_bits, floats, powers, folds, codes, *SUMS.values(), *CODE_SUMS.values(), nearest_codes, firsts,
    halves, singles, scalars,
)  # fmt: skip


@cache
def bound(name):
    found = isa.get(name)
    return primitives(found.dot4, found.dot4_u8, found.ROWS)


@cache
def compiled(body, name):
    from numba import njit

    return njit(error_model="numpy")(FunctionType(body.__code__, {**globals(), **bound(name)}, body.__name__))


def run(body, name, *arguments):
    """Call a body with integers and the addresses of arrays."""
    compiled(body, name)(*(a if isinstance(a, int) else a.ctypes.data for a in arguments))


of_queries = pytest.mark.parametrize("queries", AT_ONCE)


@pytest.fixture(params=isa.runnable())
def name(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def test_all_primitives_are_tested():
    used = {name for body in BODIES for name in body.__code__.co_names}
    assert set(bound("generic")) <= used


# Dot products.


def all_products():
    """Each byte with each code."""
    every = np.arange(256, dtype=np.uint8).reshape(4, 16, 4)
    tiles = np.tile(every, (256, 1, 1))
    codes = np.repeat(np.arange(-128, 128).astype(np.int8), 4)
    return tiles, np.stack([codes, np.roll(codes, 4), codes[::-1], codes], axis=1)


def all_extremes():
    """Each combination of four extreme bytes with each of four extreme codes."""
    extremes = np.array(list(itertools.product((0, 1, 15, 127, 128, 255), repeat=4)), np.uint8).reshape(-1, 16, 4)
    quads = np.array(list(itertools.product((-128, -127, 0, 1, 127), repeat=4)), np.int8)
    return np.tile(extremes, (len(quads), 1, 1)), np.repeat(quads, len(extremes), axis=0)


@pytest.mark.parametrize("cases", [all_products, all_extremes])
def test_dot_products_are_exact(name, cases, rng):
    tiles, codes = (np.ascontiguousarray(part) for part in cases())
    starts = rng.integers(-(2**20), 2**20, len(tiles)).astype(np.int32)
    out = np.zeros((len(tiles), 3, LANES), np.float32)
    run(dots, name, len(tiles), tiles, codes, starts, out)

    def expected(u):
        return np.einsum("nrk,nk->nr", u.astype(np.int64), codes.astype(np.int64))

    np.testing.assert_array_equal(out[:, 0], expected(tiles) + starts[:, None])
    np.testing.assert_array_equal(out[:, 1], expected(tiles & 15) + starts[:, None])
    np.testing.assert_array_equal(out[:, 2], expected(tiles >> 4))


@pytest.mark.parametrize("cases", [all_products, all_extremes])
def test_dot_products_of_pairs_of_bits_are_exact(name, cases):
    tiles, codes = (np.ascontiguousarray(part) for part in cases())
    out = np.zeros((len(tiles), 4, LANES), np.float32)
    run(pairs_of_bits, name, len(tiles), tiles, codes, out)
    for i in range(4):
        u = 8 * (tiles.astype(np.int64) >> 2 * i & 3)
        np.testing.assert_array_equal(out[:, i], np.einsum("nrk,nk->nr", u, codes.astype(np.int64)))


def test_a_dot_product_begins_anywhere_and_rounds_once(name):
    starts = np.array([-(2**31), -(2**24) - 1, 2**24 + 1, 2**24 + 3, 2**31 - 1], np.int32)
    n, out = len(starts), np.zeros((len(starts), 3, LANES), np.float32)
    run(dots, name, n, np.zeros((n, 64), np.uint8), np.full((n, 4), -128, np.int8), starts, out)
    np.testing.assert_array_equal(out[:, 0], np.broadcast_to(starts.astype(np.float32)[:, None], (n, LANES)))
    np.testing.assert_array_equal(out[:, 1], out[:, 0])


# Rows of activations.


def dot_rows(n, tiles, codes, scales, starts, out):
    """Of n tiles of 64 bytes: the dot products of each row, as integers from its start, and scaled and summed."""
    rows, acc = row_count(), rows_zero()
    for i in range(n):
        u, w = load_bytes(tiles + 64 * i), load_f16(tiles + 64 * n + 32 * i)
        sums = rows_scaled(rows_dot4_u8(rows_start(starts), u, codes), scales)
        acc = rows_add_weighted(acc, w, sums)
        store_rows(out + 128 * rows * i, acc)
        sums = rows_add_scaled(sums, rows_dot4(rows_zero_ints(), low4(u), codes), scales)
        acc = rows_fma(rows_add_weighted(acc, w, sums), w, scales)
        store_rows(out + 128 * rows * i + 64 * rows, acc)
        codes, scales, starts = codes + 4 * rows, scales + 4 * rows, starts + 4 * rows


@cache
def dot_rows_of(name, count):
    """The body compiled with the primitives of an ISA, or plain."""
    from numba import njit

    found = isa.get(name) if name else None
    names = {**bound(name), **row_primitives(found.dot4, found.dot4_u8, count)} if found else vars(plain)
    body = FunctionType(dot_rows.__code__, {**globals(), **names}, dot_rows.__name__)
    return njit(error_model="numpy")(body) if found else body


@pytest.mark.parametrize("count", ["1", "4", "most"])
def test_rows_are_as_in_plain_python(name, count, rng, monkeypatch):
    """Every operation on rows, for the numbers of rows that dot kernels are compiled for."""
    count = isa.get(name).ROWS if count == "most" else int(count)
    monkeypatch.setattr(plain, "COUNT", count)
    n = 200
    halves = rng.uniform(-1, 1, (n, LANES)).astype(np.float16)
    tiles = np.concatenate([rng.integers(0, 256, 64 * n).astype(np.uint8), halves.view(np.uint8).reshape(-1)])
    codes = rng.integers(-128, 128, (n, count, 4)).astype(np.int8)
    scales = rng.uniform(-1, 1, (n, count)).astype(np.float32)
    starts = rng.integers(-(2**22), 2**22, (n, count)).astype(np.int32)
    outs = np.full((2, n, 2, count, LANES), np.nan, np.float32)
    for which, out in zip((name, None), outs, strict=True):
        dot_rows_of(which, count)(n, *(array.ctypes.data for array in (tiles, codes, scales, starts, out)))
    assert set(dot_rows.__code__.co_names) >= set(row_primitives(None, None, 1))
    assert np.isfinite(outs).all()
    np.testing.assert_array_equal(*(out.view(np.int32) for out in outs))


# Float operations.


@cache
def float_results(name):
    """Inputs with x in [-90, 0], and what FLOATS make of them."""
    rng = np.random.default_rng(21)
    x = -np.linspace(0, 90, 16 * 4000, dtype=np.float32).reshape(-1, LANES)
    y, z = (rng.uniform(1, 2, x.shape).astype(np.float32) * rng.choice([-1, 1], x.shape) for _ in range(2))
    y, z = y.astype(np.float32), z.astype(np.float32)
    out = np.zeros((len(x), len(FLOATS), LANES), np.float32)
    run(floats, name, len(x), x, y, z, out)
    return x, y, z, dict(zip(FLOATS, out.swapaxes(0, 1), strict=True))


def test_float_operations(name):
    x, y, z, result = float_results(name)
    expected = {
        "add": x + y, "sub": x - y, "mul": x * y, "div": x / y, "maximum": np.maximum(x, y),
        "fma": (x.astype(np.float64) * y + z).astype(np.float32),
        "absolute": abs(x), "where_positive": z, "zero": 0 * z,
        "fill": y[:, :1] + 0 * z, "splat_f32": z[:, :1] + 0 * z,
    }  # fmt: skip
    for operation, values in expected.items():
        np.testing.assert_array_equal(result[operation], values, err_msg=operation)


@pytest.mark.parametrize("name", [*isa.runnable(), "plain"])
@of_queries
def test_sums_of_some_queries(name, queries, rng):
    """As fma has them one after the other; nothing else is written."""
    n = 30
    x = rng.standard_normal((8, n + 16)).astype(np.float16)
    factors = rng.standard_normal((queries, n)).astype(np.float32)
    out, counts = np.full((queries + 1, 8, LANES), np.nan, np.float32), np.zeros(2, np.int64)
    arrays = n, x, factors, out, counts
    if name == "plain":
        SUMS[queries](*(a if isinstance(a, int) else a.ctypes.data for a in arrays))
    else:
        run(SUMS[queries], name, *arrays)
    expected = np.zeros((queries, 8, LANES), np.float32)
    for i in [*range(n)] * 2:
        exact = x[None, :, i : i + LANES].astype(np.float64) * factors[:, i, None, None] + expected
        expected = exact.astype(np.float32)
    np.testing.assert_array_equal(out[:queries, : counts[0]], expected[:, : counts[0]])
    assert np.isnan(out[queries:]).all()
    assert np.isnan(out[:, counts[0] :]).all()
    if name != "plain":
        assert tuple(counts) == (vectors_of(name, queries), isa.get(name).ROWS)


def vectors_of(name, queries):
    return 4 if queries == 1 else isa.get(name).ROWS // 4


@of_queries
def test_sums_of_codes_are_as_in_plain_python(name, queries, rng, monkeypatch):
    """Of as many vectors as the ISA has registers for."""
    n, count = 30, vectors_of(name, queries)
    x = rng.integers(0, 256, 64 * n + 1024).astype(np.uint8)
    codes = rng.integers(-128, 128, (queries, n, 4)).astype(np.int8)
    factors = rng.uniform(-1, 1, (queries, n)).astype(np.float32)
    halves, wide = (rng.uniform(-1, 1, (n + 8, LANES)).astype(kind) for kind in (np.float16, np.float32))
    out = np.full((2, queries + 1, 8, LANES), np.nan, np.float32)
    arrays = [array.ctypes.data for array in (x, codes, factors, halves, wide)]
    compiled(CODE_SUMS[queries], name)(n, *arrays, out[0].ctypes.data)
    monkeypatch.setattr(plain, "VECTORS", count)
    CODE_SUMS[queries](n, *arrays, out[1].ctypes.data)
    assert np.isfinite(out[:, :queries, :count]).all()
    np.testing.assert_array_equal(out[0].view(np.int32), out[1].view(np.int32))
    assert np.isnan(out[:, queries:]).all()
    assert np.isnan(out[:, :, count:]).all()


@pytest.mark.parametrize("name", [*isa.runnable(), "plain"])
def test_nearest_codes(name, rng):
    x = np.concatenate([np.arange(-140, 140, 0.5), rng.uniform(-200, 200, 992), [1e9, -1e9, np.inf, -np.inf] * 4])
    x = x.astype(np.float32).reshape(-1, LANES)
    stored, scattered = np.zeros(x.shape, np.int8), np.zeros((4, len(x), 4), np.uint8)
    if name == "plain":
        body = FunctionType(nearest_codes.__code__, {**globals(), **vars(plain)}, nearest_codes.__name__)
        body(len(x), *(array.ctypes.data for array in (x, stored, scattered)))
    else:
        run(nearest_codes, name, len(x), x, stored, scattered)
    expected = np.clip(np.rint(x), -127, 127)
    np.testing.assert_array_equal(stored[:-1], expected[:-1])
    np.testing.assert_array_equal(scattered.swapaxes(0, 1).reshape(x.shape)[:-1], expected[:-1] + 128)


def test_fma_rounds_once(name):
    x = np.full((1, LANES), 1 + 2.0**-23, np.float32)
    z, out = -(x * x), np.zeros((len(FLOATS), LANES), np.float32)
    run(floats, name, 1, x, x, z, out)
    assert (out[FLOATS.index("fma")] == 2.0**-46).all()
    assert (out[FLOATS.index("where_positive")] == x).all()


def test_exp(name):
    x, _, _, result = float_results(name)
    inside, exact = x > -87, np.exp(x.astype(np.float64))
    assert (abs(result["exp"] / exact - 1)[inside]).max() < 2e-7
    assert (result["exp"][x < -87] == 0).all()
    assert result["exp"][0, 0] == 1


@pytest.mark.parametrize("name", [*isa.runnable(), "plain"])
def test_exp2(name):
    """1 for 0, 0 for what is too small, NaN for NaN."""
    small, others = [-126.6, -127, -1e9, -np.inf], [1e-6, np.nan, -0.5, -0.0]
    x = np.concatenate([-np.linspace(0, 126, 16 * 4000), others, small, others, small]).astype(np.float32)
    x = x.reshape(-1, LANES)
    out = np.full_like(x, -1)
    if name == "plain":
        FunctionType(powers.__code__, {**globals(), **vars(plain)})(len(x), x.ctypes.data, out.ctypes.data)
    else:
        run(powers, name, len(x), x, out)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(x))
    assert (out[x == 0] == 1).all()
    assert (out[x < -126.5] == 0).all()
    whole = x >= -126
    assert abs(out[whole] / np.exp2(x[whole].astype(np.float64)) - 1).max() < 2e-7


def test_exp_of_hardly_anything_and_of_nan(name):
    x = np.resize(np.array([0, -0.0, -87.5, -104, -1e30, -np.inf, np.nan], np.float32), (1, LANES))
    out = np.zeros((len(FLOATS), LANES), np.float32)
    run(floats, name, 1, x, np.ones_like(x), x, out)
    np.testing.assert_array_equal(out[FLOATS.index("exp")], np.resize(np.float32([1, 1, 0, 0, 0, 0, np.nan]), LANES))


def test_float_results_have_the_same_bits_on_every_isa(name):
    for operation, values in float_results(name)[-1].items():
        expected = float_results("generic")[-1][operation]
        np.testing.assert_array_equal(values.view(np.int32), expected.view(np.int32), err_msg=operation)


# Lanes and codes.


def in_tree_order(x):
    """Lane i with lane i + 8, then + 4, + 2, + 1."""
    while x.shape[1] > 1:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x[:, 0]


def test_folds(name, rng):
    x = rng.uniform(-127, 127, (2000, LANES)).astype(np.float32)
    sums, maxima = np.zeros((2, 2000), np.float32)
    run(folds, name, len(x), x, sums, maxima)
    np.testing.assert_array_equal(sums.view(np.int32), in_tree_order(x).view(np.int32))
    np.testing.assert_array_equal(maxima, x.max(axis=1))


PARTS = np.dtype(
    [("codes", np.int8, (4, 16)), ("scales", np.float32, 4), ("q4", np.int32, 4), ("q8", np.int32, 4),
     ("sums", np.float32, 2)]
)  # fmt: skip


def quantized(x, name=None):
    """What an ISA's primitive, or the plain one, makes of (n, 4, 16) float32."""
    out = np.zeros(len(x), PARTS)
    if name:
        run(codes, name, len(x), x, out)
    else:
        for values, made in zip(x, out, strict=True):
            plain.quantize_64(values.ctypes.data, made[None].ctypes.data)
    return out


def test_quantize_64(name, rng):
    x = rng.standard_normal((1000, 4, LANES)) * 10.0 ** rng.integers(-40, 38, (1000, 4, 1))
    x[0] = (np.arange(-32, 32) + 0.5).reshape(4, LANES)  # with 127 as the largest, halves go to the even neighbour
    x[0, :, 0], x[1], x[2, 1:3], x[3, 0, 5] = 127, 0, 0, -3e38
    x = x.astype(np.float32)
    found = quantized(x, name)
    largest = np.abs(x).max(2)
    exact = x.astype(np.float64) / np.where(largest < 1e-36, np.inf, largest)[..., None] * 127
    assert (np.abs(found["codes"] - exact) <= 0.5 + 127 * 2.0**-22).all()  # a quotient and a product, rounded
    np.testing.assert_array_equal(found["codes"][0], np.rint(x[0]))
    np.testing.assert_array_equal(found["scales"], largest / np.float32(127))
    totals = found["codes"].sum(axis=2, dtype=np.int32)
    np.testing.assert_array_equal(found["q4"], -8 * totals)
    np.testing.assert_array_equal(found["q8"], -128 * totals)
    terms = (largest.astype(np.float64) / 127 * totals).reshape(-1, 2, 2)
    np.testing.assert_array_equal(found["sums"], (terms[..., 1] + terms[..., 0].astype(np.float32)).astype(np.float32))
    assert found.tobytes() == quantized(x).tobytes()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_scale_is_nan_if_a_value_is(name):
    """And infinite if a value is; other groups are as they were."""
    x = np.ones((4 * LANES, 4, LANES), np.float32)
    bad = np.arange(4 * LANES)
    x[bad, bad // LANES, bad % LANES] = np.nan
    x[0, 0, 3] = -np.inf
    for found in (quantized(x, name), quantized(x)):
        expected = np.full((4 * LANES, 4), np.float32(1) / np.float32(127))
        expected[bad, bad // LANES] = np.nan
        np.testing.assert_array_equal(found["scales"], expected)
        others = np.arange(4) != (bad // LANES)[:, None]
        assert (found["codes"][others] == 127).all()
    x[0, 0, 0] = 1
    assert quantized(x, name)["scales"][0, 0] == np.inf


def test_first(name, rng):
    x, y = rng.standard_normal((2, LANES)).astype(np.float32)
    out = np.zeros((17, LANES), np.float32)
    run(firsts, name, x, y, out)
    np.testing.assert_array_equal(out, np.where(np.arange(LANES) < np.arange(17)[:, None], x, y))


# Memory.


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_float32_to_float16_rounds_to_even(name, rng):
    between = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (between[1:] + between[:-1]) / 2
    wide = rng.standard_normal(2000) * 2.0 ** rng.integers(-30, 20, 2000)
    x = np.resize(np.concatenate([between, -between, wide, [65519, 65520, np.inf]]).astype(np.float32), (4200, LANES))
    vector, scalar = np.zeros((2, *x.shape), np.float16)
    scattered = np.zeros((LANES, len(x)), np.float16)
    run(halves, name, len(x), x, vector, scattered, scalar)
    expected = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(vector.view(np.uint16), expected)
    np.testing.assert_array_equal(scattered.view(np.uint16), expected.T)
    np.testing.assert_array_equal(scalar.view(np.uint16), expected)


def test_float16_to_float32(name):
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x[np.isnan(x)] = np.nan  # quiet ones: converting others warns on Arm
    vector, scalar = np.zeros((2, *x.shape), np.float32)
    run(singles, name, len(x) // LANES, x, vector, scalar)
    np.testing.assert_array_equal(vector, x.astype(np.float32))
    np.testing.assert_array_equal(scalar, vector)


def test_memory_need_not_be_aligned(name, rng):
    memory = rng.integers(0, 256, 65).astype(np.uint8)
    out = np.zeros(32, np.uint8)
    run(scalars, name, memory[1:], out)
    np.testing.assert_array_equal(out[:16], memory[1:17])
    assert out[16:24].view(np.int64) == memory[9]
    half = np.zeros(LANES, np.float32)
    run(singles, name, 1, memory[1:], half, np.zeros(LANES, np.float32))
    np.testing.assert_array_equal(half, memory[1:33].copy().view(np.float16).astype(np.float32))


# The choice.


def test_names_are_best_first():
    assert isa.names() == ["avx512vnni", "avxvnni", "avx2", "neon_dotprod", "neon", "generic"]
    assert isa.runnable() == [name for name in isa.names() if name in isa.runnable()]


def test_the_best_isa_is_chosen(monkeypatch):
    monkeypatch.delenv("EDGELLM_ISA", raising=False)
    assert isa.detect() is isa.get(isa.runnable()[0])


def test_another_isa_can_be_asked_for(name, monkeypatch):
    monkeypatch.setenv("EDGELLM_ISA", name)
    assert isa.detect() is isa.get(name)


@pytest.mark.parametrize("wanted", ["nothing", *sorted({"neon", "avx2"} - set(isa.runnable()))])
def test_an_isa_that_does_not_run_is_refused(wanted, monkeypatch):
    monkeypatch.setenv("EDGELLM_ISA", wanted)
    with pytest.raises(BackendError, match=f"'{wanted}'; this CPU runs {', '.join(isa.runnable())}$"):
        isa.detect()


def test_an_unknown_isa_is_refused():
    with pytest.raises(BackendError, match="unknown ISA 'nothing'; known: avx512vnni, avxvnni, "):
        isa.get("nothing")


CPUS = {
    "avx512vnni": ("x86_64", "avx512f avx512bw avx512vl avx512vnni avx2 fma f16c"),
    "avxvnni": ("x86_64", "avxvnni avx2 fma f16c"),
    "avx2": ("x86_64", "avx2 fma f16c"),
    "neon_dotprod": ("aarch64", "dotprod"),
    "neon": ("aarch64", ""),
    "generic": ("x86_64", "f16c"),
}


@pytest.mark.parametrize("best", CPUS)
def test_the_best_isa_of_other_cpus(best, monkeypatch):
    machine, features = CPUS[best]
    monkeypatch.setattr(isa, "cpu", lambda: (machine, frozenset(features.split())))
    assert isa.runnable()[0] == best


@pytest.mark.parametrize(
    ("name", "there"), [("cortex-a76", True), ("apple-m1", True), ("cortex-a72", False), ("generic", False)]
)
def test_the_name_of_an_arm_cpu_implies_dot_products(name, there):
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    assert _host._emits_dot_products("aarch64-unknown-linux-gnu", name, "+neon,+fp-armv8") == there


def test_the_machine_is_named_as_isas_name_it():
    machine, features = isa.cpu()
    assert machine in {isa.get(name).MACHINE for name in isa.names()}
    assert all(isinstance(feature, str) for feature in features)


@pytest.mark.parametrize(("cpu", "lines"), [("znver4", 2), ("sapphirerapids", 1), ("cortex-a76", 1)])
def test_cpus_that_fetch_a_lines_neighbour(cpu, lines, monkeypatch):
    monkeypatch.setattr(vectors, "host", lambda: ("", cpu, ""))
    from numba import njit

    found = primitives(isa.get("generic").dot4, isa.get("generic").dot4_u8, 4)["fetched_lines"]
    assert njit(lambda: found())() == lines
