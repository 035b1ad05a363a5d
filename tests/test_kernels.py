"""The matmul kernels, every format on every ISA that runs here: against NumPy, each other, and themselves in parts."""

from functools import cache

import numpy as np
import pytest

from edgellm import isa, quant
from edgellm.kernels import compiler, dots, layout
from edgellm.kernels.matmul import matmul
from edgellm.kernels.prepare import prepare

ISAS, FORMATS = isa.runnable(), quant.names()
SHAPES = [(1, 16, 64, 0), (1, 200, 172, 0), (29, 40, 32, 0), (29, 64, 96, 16), (4, 17, 1000, 0), (12, 96, 576, 48)]
"""Rows of activations, rows and columns of the matrix, pair."""


def zeroed(n_bytes):
    """Memory on a boundary of 64 bytes."""
    block = np.zeros(n_bytes + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + n_bytes]


@cache
def problem(fmt, rows, n, k, pair):
    """A matrix as it is stored, its values, and activations."""
    rng, module = np.random.default_rng(rows + n + k), quant.get(fmt)
    values = (rng.standard_normal((n, k)) / k**0.5).astype(np.float32)
    quantized = module.quantize(values)
    order = quant.paired(n, pair) if pair else np.arange(n)
    stored = quant.Quantized(*(None if part is None else part[order] for part in quantized))
    x = (rng.standard_normal((rows, k)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)
    x[-1, : k // 2] = 0
    return module.pack(stored), module.dequantize(quantized), x


def multiply(isa_name, fmt, rows, n, k, pair, x=None, n_threads=1, bodies=(prepare, matmul), step_fields=(), **fields):
    """What the kernels compute; the threads take turns."""
    tiles, _, activations = problem(fmt, rows, n, k, pair)
    x = activations if x is None else x
    chosen = isa.get(isa_name)
    kernels = compiler(chosen)
    blocks, n_tiles = quant.tile_grid(n, k)
    code_bytes = 1 if fmt[0] == "q" else 4
    packed = n_tiles * (64 * code_bytes + 56)
    weight, source = zeroed(tiles.nbytes + 8192), np.zeros((len(x), 64 * n_tiles + 64), np.float32)
    weight[: tiles.nbytes], source[:, : x.shape[1]] = tiles.reshape(-1), x
    scratch_bytes = 2 * (4096 + 256 * n_tiles + packed)
    scratch, shared = zeroed(n_threads * scratch_bytes), zeroed(len(x) * packed)
    out = np.full((len(x), blocks * 16), 0.5, np.float32)
    record = cells(layout.RECORD_CELLS, "", {
        "WEIGHT": weight.ctypes.data, "N_BLOCKS": blocks, "N_TILES": n_tiles, "COLS": k, "PAIR": pair,
        "TILE_BYTES": quant.get(fmt).TILE_BYTES, "CODE_BYTES": code_bytes, "ROWS_N": chosen.ROWS,
        "SOURCE": source.ctypes.data, "SOURCE_STRIDE": source.strides[0], "TARGET": out.ctypes.data,
        "TARGET_STRIDE": out.strides[0], **fields,
        **{f"DOT_{name}": kernels.dot(getattr(dots, fmt), count)
           for name, count in (("1", 1), ("4", 4), ("N", chosen.ROWS))},
    })  # fmt: skip
    step = cells(layout.STEP_CELLS, "STEP_", {
        "ROWS": len(x), "SCRATCH": scratch.ctypes.data, "SCRATCH_BYTES": scratch_bytes, "PACKED": shared.ctypes.data,
        **dict(step_fields),
    })  # fmt: skip
    for body in bodies:
        for thread in range(n_threads):
            kernels.function(body)(record.ctypes.data, step.ctypes.data, thread, n_threads)
    return out[:, :n]


def cells(count, prefix, fields):
    array = np.zeros(count, np.int64)
    for name, value in fields.items():
        at = getattr(layout, prefix + name) // layout.CELL
        if isinstance(value, float):
            array[at : at + 1].view(np.float32)[0] = value
        else:
            array[at] = value
    return array


def expected(fmt, x, values):
    """The product with activations rounded as the kernels round them, and the sum of the sizes of its terms."""
    if fmt[0] == "q":
        groups = np.pad(x, ((0, 0), (0, -x.shape[1] % 16))).reshape(len(x), -1, 16).astype(np.float64)
        largest = np.abs(groups).max(2, keepdims=True)
        inverse = np.divide(127, largest, where=largest > 0, out=np.zeros_like(largest)).astype(np.float32)
        codes = np.rint((groups.astype(np.float32) * inverse).astype(np.float32))
        rounded = codes * (largest / 127).astype(np.float32).astype(np.float64)
        x = rounded.reshape(len(x), -1)[:, : x.shape[1]]
    return x @ values.T.astype(np.float64), np.abs(x) @ np.abs(values.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ISAS)
def test_matmul(name, fmt, shape):
    """Within 4 roundings of float32 for each group of the exact product of what was rounded to int8."""
    _, values, x = problem(fmt, *shape)
    product, size = expected(fmt, x, values)
    found = multiply(name, fmt, *shape)
    steps = -(-shape[2] // 16) if fmt[0] == "q" else shape[2]
    # q4m's codes do not have the zero of their values: what it adds and takes away again is larger than the sum.
    slack = 20 if fmt == "q4m" else 1
    assert (np.abs(found - product) <= 4 * steps * 2**-24 * size * slack + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_isa_gives_the_same_bits(fmt, shape):
    first, *others = [multiply(name, fmt, *shape) for name in ISAS]
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_and_threads_do_not_matter(fmt):
    """A row alone, in any batch, on any number of threads: the same bits."""
    shape = (29, 64, 96, 16)
    _, _, x = problem(fmt, *shape)
    whole = multiply(ISAS[0], fmt, *shape)
    for n_threads in (2, 3):
        np.testing.assert_array_equal(multiply(ISAS[0], fmt, *shape, n_threads=n_threads), whole)
    for first, stop in ((0, 1), (3, 7), (5, 17), (28, 29)):
        np.testing.assert_array_equal(multiply(ISAS[0], fmt, *shape, x=x[first:stop]), whole[first:stop])


@pytest.mark.parametrize("name", ISAS)
def test_norm_gate_and_sum(name):
    """The prologues and the epilogue, in float32 weights, where only they can differ."""
    shape, rng = (5, 48, 72, 0), np.random.default_rng(0)
    _, values, x = problem("f32", *shape)
    norm = np.zeros(80, np.float32)
    norm[:72] = rng.uniform(0.5, 2, 72)
    eps = 1e-5
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + eps) * norm[:72]
    found = multiply(name, "f32", *shape, PROLOGUE=1, NORM=norm.ctypes.data, NORM_EPS=eps, ADDS=1)
    np.testing.assert_allclose(found, normed @ values.T + 0.5, rtol=1e-5, atol=1e-5)
    both = rng.standard_normal((5, 144)).astype(np.float32) * 5
    gate, up = np.split(both.astype(np.float64), 2, axis=1)
    cubic = (2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    for kind, gated in ((2, gate / (1 + np.exp(-gate))), (3, gate * 0.5 * (1 + np.tanh(cubic)))):
        found = multiply(name, "f32", *shape, x=both, PROLOGUE=kind)
        np.testing.assert_allclose(found, (gated * up) @ values.T, rtol=1e-4, atol=1e-4)
