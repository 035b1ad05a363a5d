"""Embedding, RoPE and the append to the cache, on every ISA that runs here, against NumPy."""

import fresh
import numpy as np
import pytest

pytest.importorskip("numba")

from test_kernels import FORMATS, ISAS, U, cells, of_team, problem

from edgellm import isa, quant
from edgellm.kernels import compiler, layout
from edgellm.kernels.rows import FORMATS as NUMBERS
from edgellm.kernels.rows import embed, rope_angles, rope_append


def run(name, body, fields, step, n_threads=2):
    """An op, by threads that take turns."""
    record, step = cells(layout.RECORD_CELLS, "", fields), cells(layout.STEP_CELLS, "STEP_", step)
    arrivals = of_team(step, n_threads)
    for thread in reversed(range(n_threads)):
        compiler(isa.get(name)).function(body)(record.ctypes.data, step.ctypes.data, thread, n_threads)
    assert (arrivals[:, 0] == 0).all()  # an op does not say that it is done


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (97, 72), (33, 1)])
def test_embed(name, fmt, n, k):
    """Exactly; but q4m's values are a product and a sum, which the definition rounds both, a kernel perhaps once."""
    matrix, _ = problem(fmt, 1, n, k, 0)
    rng, tiles = fresh.rng("embed"), matrix.tiles()
    tokens = rng.permutation(np.concatenate([np.arange(n), [0, n - 1]])).astype(np.int32)
    out = np.full((len(tokens) + 1, k + 3), np.nan, np.float32)
    blocks, n_tiles = quant.tile_grid(n, k)
    run(name, embed, {
        "WEIGHT": tiles.ctypes.data, "N_BLOCKS": blocks, "N_TILES": n_tiles, "TARGET": out.ctypes.data, "COLS": k,
        "TILE_BYTES": quant.get(fmt).TILE_BYTES, "TARGET_STRIDE": out.strides[0], "TABLE_FORMAT": NUMBERS.index(fmt),
        "SCALE": 1.0,
    }, {"ROWS": len(tokens), "TOKENS": tokens.ctypes.data})  # fmt: skip
    bound = np.zeros((n, k))
    if fmt == "q4m":
        minimum = np.abs(quant.per_column(matrix.quantized.minimum, k))
        bound = U * (3 * np.abs(matrix.values) + minimum)
    assert (np.abs(out[:-1, :k] - matrix.values[tokens]) <= bound[tokens]).all()
    assert np.isnan(out[:-1, k:]).all()
    assert np.isnan(out[-1]).all()


@pytest.mark.parametrize("name", ISAS)
def test_angles(name):
    """Cosine and sine of the float32 product of position and frequency, within a unit in the last place below 1."""
    frequencies = (1e4 ** -(np.arange(20) / 20)).astype(np.float32)
    positions = np.array([0, 1, 5, 511, 4097, 131_071], np.int32)
    out = np.full((len(positions), 48), np.nan, np.float32)
    run(name, rope_angles, {
        "TARGET": out.ctypes.data, "TARGET_STRIDE": out.strides[0], "N_ANGLES": 20, "SCALE": 1.0,
        "ANGLES": frequencies.ctypes.data,
    }, {"ROWS": len(positions), "POSITIONS": positions.ctypes.data})  # fmt: skip
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    assert (np.abs(out[:, :20] - np.cos(angles)) <= 2.0**-24).all()
    assert (np.abs(out[:, 20:40] - np.sin(angles)) <= 2.0**-24).all()
    assert np.isnan(out[:, 40:]).all()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    ("head_dim", "n_heads", "n_kv_heads"), [(2, 1, 1), (12, 6, 2), (64, 9, 3), (80, 4, 4), (128, 8, 1)]
)
def test_rope_and_append(name, head_dim, n_heads, n_kv_heads):
    """Exactly what float32 NumPy computes, and its float16 in the cache; nothing else is written."""
    rng, half, capacity = fresh.rng("rope", head_dim), head_dim // 2, 128
    positions, slots = np.array([3, 4, 200, 0, 255], np.int32), np.array([1, 1, 0, 2, 3], np.int32)
    q, k, v = (rng.standard_normal((5, n * head_dim)).astype(np.float32) for n in (n_heads, n_kv_heads, n_kv_heads))
    turns = rng.uniform(-1, 1, (5, 2, half)).astype(np.float32)
    size, offset = n_kv_heads * capacity * head_dim, 64
    caches = np.full((4, offset + 2 * size + offset), np.nan, np.float16)
    addresses = caches.ctypes.data + np.arange(4) * caches.strides[0]
    turned = [x.copy() for x in (q, k)]
    run(name, rope_append, {
        "N_HEADS": n_heads, "N_KV_HEADS": n_kv_heads, "HEAD_DIM": head_dim, "CAPACITY": capacity,
        "KV_OFFSET": 2 * offset, "V_OFFSET": 2 * (offset + size), "ANGLES": turns.ctypes.data,
        "ANGLES_STRIDE": turns.strides[0], "N_ANGLES": half, "QUERIES": turned[0].ctypes.data,
        "SOURCE_STRIDE": q.strides[0], "KEYS": turned[1].ctypes.data, "VALUES": v.ctypes.data,
        "TARGET_STRIDE": k.strides[0],
    }, {
        "ROWS": 5, "POSITIONS": positions.ctypes.data, "SLOTS": slots.ctypes.data, "CACHES": addresses.ctypes.data,
    })  # fmt: skip
    q, k = (rope(x, turns) for x in (q, k))
    np.testing.assert_array_equal(turned[0], q)
    expected = np.full_like(caches, np.nan)
    for row, (slot, at) in enumerate(zip(slots, positions % capacity, strict=True)):
        keys, values = np.split(expected[slot, offset:-offset], 2)
        keys = keys.reshape(n_kv_heads, capacity // 16, head_dim, 16)
        keys[:, at // 16, :, at % 16] = k[row].reshape(n_kv_heads, head_dim)
        values.reshape(n_kv_heads, capacity, head_dim)[:, at] = v[row].reshape(n_kv_heads, head_dim)
    np.testing.assert_array_equal(caches, expected)


def rope(x, turns):
    """Each head's halves (x, y) to (x cos - y sin, y cos + x sin), a rounding for each operation."""
    (cos, sin), head_dim = turns.swapaxes(0, 1)[:, :, None], 2 * turns.shape[2]
    first, second = np.split(x.reshape(len(x), -1, head_dim), 2, axis=2)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2).reshape(x.shape)
