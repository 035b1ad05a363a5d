"""Every weight format: layout, exactness of what it holds, error of what it rounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm import quant
from edgellm.errors import UnsupportedError

FORMATS = quant.names()
BITS = {"f32": 32, "f16": 16, "q8": 8.5, "q4": 4.5, "q4m": 5.0, "q2t": 2.5}
ERROR = {"f32": 0, "f16": 3e-4, "q8": 0.007, "q4": 0.10, "q4m": 0.08, "q2t": 0.43}
"""Upper bounds of the relative RMS error on normally distributed weights."""


def weights(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def values_of(fmt, quantized):
    return quant.get(fmt).dequantize(quantized)


def test_names_are_the_documented_formats():
    assert sorted(BITS) == FORMATS


def test_unknown_format_is_named():
    with pytest.raises(UnsupportedError, match=r"'q3'.*f16, f32, q2t, q4"):
        quant.get("q3")


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_per_weight(fmt):
    assert BITS[fmt] == quant.get(fmt).TILE_BYTES * 8 / (16 * 64)
    assert quant.get(fmt).TILE_BYTES % 64 == 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_relative_error(fmt):
    x = weights(64, 256)
    error = np.sqrt(np.mean((values_of(fmt, quant.get(fmt).quantize(x)) - x) ** 2) / np.mean(x**2))
    assert error <= ERROR[fmt]


@pytest.mark.parametrize("fmt", FORMATS)
@given(rows=st.integers(1, 50), cols=st.integers(1, 200), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_pack_unpack_is_exact_for_any_shape(fmt, rows, cols, seed):
    module = quant.get(fmt)
    quantized = module.quantize(weights(rows, cols, seed))
    tiles = module.pack(quantized)
    assert tiles.shape == (*quant.tile_grid(rows, cols), module.TILE_BYTES)
    assert tiles.dtype == np.uint8
    for before, after in zip(quantized, module.unpack(tiles, rows, cols), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantizing_what_was_quantized_changes_nothing_in_exact_formats(fmt):
    once = values_of(fmt, quant.get(fmt).quantize(weights(17, 70)))
    twice = values_of(fmt, quant.get(fmt).quantize(once))
    np.testing.assert_allclose(twice, once, atol=np.abs(once).max() * (0 if fmt[0] == "f" else 0.2))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9])
def test_constant_groups(fmt, value):
    x = np.full((3, 40), value, np.float32)
    np.testing.assert_allclose(values_of(fmt, quant.get(fmt).quantize(x)), x, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(fmt):
    module, x = quant.get(fmt), weights(33, 100)
    alone = np.concatenate([values_of(fmt, module.quantize(x[i : i + 1])) for i in range(33)])
    np.testing.assert_array_equal(values_of(fmt, module.quantize(x)), alone)


def test_padding_of_symmetric_formats_is_the_value_zero():
    for fmt in ("q2t", "q4", "q8"):
        tiles = quant.get(fmt).pack(quant.get(fmt).quantize(weights(5, 33)))
        everything = values_of(fmt, quant.get(fmt).unpack(tiles, 16, 64))
        assert not everything[5:].any()
        assert not everything[:, 33:].any()


def test_q8_tile_bytes():
    """[column / 4][row][column % 4] codes, then [group][row] scales."""
    codes = np.arange(16 * 64, dtype=np.int64).reshape(16, 64).astype(np.uint8)
    scale = np.arange(32, dtype=np.float16).reshape(16, 2)
    tile = quant.get("q8").pack(quant.Quantized(codes, scale))[0, 0]
    for row, col in [(0, 0), (3, 5), (15, 63), (7, 32)]:
        assert tile[col // 4 * 64 + row * 4 + col % 4] == codes[row, col]
        assert tile[1024:].view(np.float16)[col // 32 * 16 + row] == scale[row, col // 32]


@pytest.mark.parametrize("fmt", ["q4", "q4m"])
def test_q4_tile_bytes(fmt):
    """Byte g*256 + j*64 + row*4 + b: column g*32 + j*8 + b low, the column 4 further high; then scales, minima."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (16, 64), np.uint8), np.arange(32, dtype=np.float16).reshape(16, 2)
    minimum = -scale if fmt == "q4m" else None
    tile = quant.get(fmt).pack(quant.Quantized(codes, scale, minimum))[0, 0]
    for row, col in [(0, 0), (3, 5), (15, 63), (7, 36), (1, 4)]:
        g, j, half, b = col // 32, col % 32 // 8, col % 8 // 4, col % 4
        assert tile[g * 256 + j * 64 + row * 4 + b] >> 4 * half & 15 == codes[row, col]
        assert tile[512:576].view(np.float16)[g * 16 + row] == scale[row, g]
        if fmt == "q4m":
            assert tile[576:].view(np.float16)[g * 16 + row] == -scale[row, g]


def test_q2t_tile_bytes():
    """Byte v*64 + row*4 + b: columns v*16 + b, then 4, 8 and 12 further, from the low bits up; then scales."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 4, (16, 64), np.uint8), np.arange(32, dtype=np.float16).reshape(16, 2)
    tile = quant.get("q2t").pack(quant.Quantized(codes, scale))[0, 0]
    for row, col in [(0, 0), (3, 5), (15, 63), (7, 32), (1, 14)]:
        v, i, b = col // 16, col % 16 // 4, col % 4
        assert tile[v * 64 + row * 4 + b] >> 2 * i & 3 == codes[row, col]
        assert tile[256:].view(np.float16)[col // 32 * 16 + row] == scale[row, col // 32]


def test_q2t_keeps_a_ternary_matrix():
    scales = np.float16([[0.0123], [2.0**-20], [300.5], [0]]).astype(np.float32)
    ternary = np.random.default_rng(0).integers(-1, 2, (4, 100)).astype(np.float32)
    np.testing.assert_array_equal(values_of("q2t", quant.get("q2t").quantize(ternary * scales)), ternary * scales)


def test_q2t_has_the_best_scale_of_each_group():
    """Of a thousand that are tried, none has a smaller error."""
    x = weights(20, 32)
    found = np.square(values_of("q2t", quant.get("q2t").quantize(x)) - x).sum(1)
    tried = np.linspace(0, 4, 1000, dtype=np.float32)[:, None, None]
    best = np.square(np.clip(np.rint(x / np.maximum(tried, 1e-9)), -1, 1) * tried - x).sum(2).min(0)
    assert (found <= best * 1.001).all()


def test_overflow_shows_in_the_values_and_warns_nobody():
    assert not np.isfinite(values_of("f16", quant.get("f16").quantize(np.full((1, 1), 1e6, np.float32)))).all()
