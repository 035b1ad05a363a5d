"""The matmul kernels, every format on every ISA that runs here: against their definition, each other, and in parts.

The bounds are those of float32 arithmetic, rounding by rounding: rounding to r is off by at most U * |r|. So a sum that
is rounded at each step is off by at most U times the sizes of its partial sums, and by what its terms are off already.
Sums of codes are exact.
"""

import math
from dataclasses import dataclass, replace

import fresh
import numpy as np
import pytest

pytest.importorskip("numba")

from edgellm import isa, quant
from edgellm.kernels import compiler, dots, layout
from edgellm.kernels.matmul import matmul
from edgellm.kernels.prepare import prepare

ISAS, FORMATS = isa.runnable(), quant.names()
ZEROS = {"q2t": 1, "q4": 8, "q4m": 0, "q8": 128}
"""The code that a dot product counts as 0, of each format with int8 activations."""
FLOATS = {"f16": np.float16, "f32": np.float32}
U = 2.0**-24 * 1.01  # 1.01 for what roundings do to roundings
SHAPES = [
    (1, 16, 64, 0), (1, 200, 172, 0), (2, 17, 1000, 0), (3, 33, 60, 0), (4, 1, 65, 0), (5, 64, 96, 16),
    (13, 40, 32, 0), (17, 96, 576, 48), (29, 18, 1, 0), (5, 16, 16_400, 0),
]  # fmt: skip
"""Rows of activations, rows and columns of the matrix, pair."""
MIXED = (29, 64, 108, 16)


# A matrix, and what the kernels make of it.


@dataclass(frozen=True, eq=False)
class Matrix:
    fmt: str
    quantized: quant.Quantized
    pair: int = 0

    @property
    def values(self):
        return quant.get(self.fmt).dequantize(self.quantized).astype(np.float64)

    def tiles(self):
        n = len(self.quantized.codes)
        order = quant.paired(n, self.pair) if self.pair else np.arange(n)
        stored = quant.Quantized(*(None if part is None else part[order] for part in self.quantized))
        return quant.get(self.fmt).pack(stored)


def problem(fmt, rows, n, k, pair):
    """A matrix of any codes, scales and minima that the format holds, and activations; some of all are 0."""
    rng = fresh.rng(fmt, rows, n, k, pair)

    def halves():
        numbers = rng.uniform(-1, 1, (n, -(-k // quant.GROUP))) * 2.0 ** rng.integers(-4, 1, (n, 1))
        return np.where(rng.random(numbers.shape) < 0.03, 0, numbers).astype(np.float16)

    if fmt in FLOATS:
        quantized = quant.Quantized(
            (rng.standard_normal((n, k)) * 2.0 ** rng.integers(-8, 4, (n, 1))).astype(FLOATS[fmt])
        )
    else:
        codes = rng.integers(0, {"q8": 256, "q2t": 4}.get(fmt, 16), (n, k)).astype(np.uint8)
        quantized = quant.Quantized(codes, halves(), halves() if fmt == "q4m" else None)
    x = (rng.standard_normal((rows, k)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)
    x[-1, : k // 2] = 0
    return Matrix(fmt, quantized, pair), x


def multiply(
    name, matrix, x, n_threads=1, wanted=None, twice=False, shift=0, bodies=(prepare, matmul), step_fields=(), **fields
):
    """What the kernels of an ISA compute; the threads take turns, the last one first.

    wanted: compute these rows only. twice: the result of a second matmul, which finds the rows prepared. shift: put
    everything that many bytes off its boundary. What stands behind a row of activations is NaN.
    """
    (n, k), chosen, fmt = matrix.quantized.codes.shape, isa.get(name), matrix.fmt
    kernels, (blocks, n_tiles) = compiler(chosen), quant.tile_grid(n, k)
    code_bytes = 4 if fmt in FLOATS else 1
    packed, n_rows = n_tiles * (64 * code_bytes + 56), len(x) if wanted is None else len(wanted)
    tiles = matrix.tiles().reshape(-1)
    weight, scratch_bytes = zeroed(tiles.nbytes, shift), 2 * (4096 + 256 * n_tiles + packed)
    weight[:] = tiles
    source = zeroed(4 * len(x) * (x.shape[1] + 128), shift).view(np.float32).reshape(len(x), -1)
    source[:], source[:, : x.shape[1]] = np.nan, x
    scratch, shared = zeroed(n_threads * scratch_bytes, shift), zeroed(n_rows * packed, shift)
    out = zeroed(64 * (n_rows + 1) * blocks, shift).view(np.float32).reshape(n_rows + 1, -1)
    out[:] = 0.5
    wanted = np.arange(len(x), dtype=np.int32) if wanted is None else np.array(wanted, np.int32)
    record = cells(layout.RECORD_CELLS, "", {
        "WEIGHT": weight.ctypes.data, "N_BLOCKS": blocks, "N_TILES": n_tiles, "COLS": k, "PAIR": matrix.pair,
        "TILE_BYTES": quant.get(fmt).TILE_BYTES, "CODE_BYTES": code_bytes, "ROWS_N": chosen.ROWS,
        "SOURCE": source.ctypes.data, "SOURCE_STRIDE": source.strides[0], "TARGET": out.ctypes.data,
        "TARGET_STRIDE": out.strides[0], **fields,
        **{f"DOT_{name}": kernels.dot(getattr(dots, fmt), count)
           for name, count in (("1", 1), ("4", 4), ("N", chosen.ROWS))},
    })  # fmt: skip
    step = cells(layout.STEP_CELLS, "STEP_", {
        "ROWS": len(x), "SCRATCH": scratch.ctypes.data, "SCRATCH_BYTES": scratch_bytes, "PACKED": shared.ctypes.data,
        "WANTED": wanted.ctypes.data, "N_WANTED": len(wanted), "LOGITS": out.ctypes.data, **dict(step_fields),
    })  # fmt: skip
    arrivals = of_team(step, n_threads)

    def run(*bodies):
        for body in bodies:
            arrivals[:, 0] += 1
            for thread in reversed(range(n_threads)):
                kernels.function(body)(record.ctypes.data, step.ctypes.data, thread, n_threads)

    run(*bodies)
    if twice:
        source[:], out[:], record[layout.SAME_INPUT // layout.CELL] = np.nan, 0.5, 1
        run(matmul)
    assert (out[-1] == 0.5).all()
    return out[:-1, :n]


def zeroed(n_bytes, shift):
    """Memory on a boundary of 64 bytes, or that many bytes off it."""
    block = np.zeros(n_bytes + 128, np.uint8)
    start = -block.ctypes.data % 64 + shift
    return block[start : start + n_bytes]


def of_team(step, n_threads):
    """What threads tell each other; its first column counts the barriers that they came to."""
    arrivals = np.zeros((n_threads, layout.ARRIVAL_BYTES // layout.CELL), np.int64)
    step[layout.STEP_ARRIVALS // layout.CELL] = arrivals.ctypes.data
    return arrivals


def cells(count, prefix, fields):
    array = np.zeros(count, np.int64)
    for name, value in fields.items():
        at = getattr(layout, prefix + name) // layout.CELL
        if isinstance(value, float):
            array[at : at + 1].view(np.float32)[0] = value
        else:
            array[at] = value
    return array


# What they have to compute.


def definition(matrix, x):
    """The product of a matrix and activations as they are rounded to int8, and how far off a kernel may be."""
    if matrix.fmt in FLOATS:
        terms = x.astype(np.float64)[:, None] * matrix.values
        return terms.sum(2), U * np.abs(terms.cumsum(2)).sum(2)
    codes, scales = rounded(x)
    weights = padded(matrix.quantized.codes.astype(float) - ZEROS[matrix.fmt], 64)
    weights = weights.reshape(len(weights), -1, 16)
    sums = (codes.swapaxes(0, 1) @ weights.transpose(1, 2, 0)).transpose(1, 2, 0) * scales[:, None]
    first, second = sums[..., 0::2], sums[..., 1::2]  # of 32 columns
    weight_scales = per_32(matrix, 1)
    terms = weight_scales * (first + second)
    slips = np.abs(weight_scales) * (np.abs(first) + np.abs(first + second))
    if matrix.fmt == "q4m":
        terms, slips = with_minima(matrix, terms, slips, scales * codes.sum(2))
    return terms.sum(2), U * (slips + np.abs(terms.cumsum(2))).sum(2)


def rounded(x):
    """(rows, k) -> int8 codes (rows, groups, 16), and their scales (rows, groups), in float64."""
    groups = padded(x, 64).reshape(len(x), -1, 16)
    largest = np.abs(groups).max(2).astype(np.float64)
    inverse = np.divide(127, largest, where=largest > 0, out=np.zeros_like(largest)).astype(np.float32)
    codes, scales = np.rint(groups * inverse[..., None]), (largest / 127).astype(np.float32)
    return codes.astype(np.float64), scales.astype(np.float64)


def with_minima(matrix, terms, slips, sums):
    """q4m's minimum times the sum of 32 activations, after the terms of these. The sum is of two products, each
    rounded, the first with its rounded scale, and is then rounded itself."""
    first, second = sums[:, 0::2], sums[:, 1::2]
    slip = 2 * np.abs(first) + np.abs(second) + np.abs(first + second)
    minima = per_32(matrix, 2)
    columns = [terms, minima * (first + second)[:, None]]
    slip_columns = [slips, np.abs(minima) * slip[:, None]]
    return (np.stack(part, axis=3).reshape(*terms.shape[:2], -1) for part in (columns, slip_columns))


def per_32(matrix, part):
    """A matrix's scales (part 1) or minima (2) for each 32 columns of whole tiles: (n, groups)."""
    return padded(matrix.quantized[part].astype(np.float64), 2)


def padded(array, multiple):
    return np.pad(array, ((0, 0), (0, -array.shape[1] % multiple)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_matmul(fmt, shape):
    """Of the best ISA; the others have the same bits."""
    matrix, x = problem(fmt, *shape)
    product, bound = definition(matrix, x)
    assert (np.abs(multiply(ISAS[0], matrix, x) - product) <= bound).all()


@pytest.mark.parametrize(("fmt", "part"), [
    *((fmt, "codes") for fmt in FORMATS), *((fmt, "scale") for fmt in ZEROS), ("q4m", "minimum"),
])  # fmt: skip
def test_the_bound_notices_one_wrong_number(fmt, part):
    """In each group: a code that is off by one; a scale, minimum or value off by a 16th of its row's largest."""
    matrix, x = problem(fmt, 5, 16, 576, 0)
    if fmt in ZEROS:  # a code counts for nothing where its scale is 0
        matrix.quantized.scale[3] += np.copysign(0.1, matrix.quantized.scale[3])
    product, bound = definition(matrix, x)
    numbers = getattr(matrix.quantized, part)
    for group in range(576 // quant.GROUP):
        wrong, at = numbers.copy(), (3, group if part != "codes" else group * quant.GROUP + 5)
        if wrong.dtype == np.uint8:
            wrong[at] ^= 1
        else:
            wrong[at] += np.abs(wrong[3]).max() / 16
        found = multiply(ISAS[0], replace(matrix, quantized=matrix.quantized._replace(**{part: wrong})), x)
        off = np.abs(found - product) > bound
        assert off[:, 3].any(), (group, at)
        assert not np.delete(off, 3, axis=1).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_isa_gives_the_same_bits(fmt, shape):
    first, *others = (multiply(name, *problem(fmt, *shape)) for name in ISAS)
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_and_threads_do_not_matter(name, fmt):
    """A row alone, in any batch, on any number of threads: the same bits."""
    matrix, x = problem(fmt, *MIXED)
    whole = multiply(name, matrix, x)
    for n_threads in (2, 3, 7):
        np.testing.assert_array_equal(multiply(name, matrix, x, n_threads), whole)
    for rows in (1, 2, 3, 4, 5, 11, 12, 13, 16, 17, 25):
        first = (5 * rows) % (len(x) - rows + 1)
        part = multiply(name, matrix, x[first : first + rows], n_threads=rows % 3 + 1)
        np.testing.assert_array_equal(part, whole[first : first + rows])


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_pairs_sums_and_wanted_rows(name, fmt):
    """What surrounds a product changes no bit of it, nor does where it stands in memory."""
    matrix, x = problem(fmt, *MIXED)
    whole = multiply(name, matrix, x)
    for pair in (0, 32):
        np.testing.assert_array_equal(multiply(name, replace(matrix, pair=pair), x), whole)
    for adds in (1.0, -0.25):
        np.testing.assert_array_equal(multiply(name, matrix, x, ADDS=adds), np.float32(0.5) + np.float32(adds) * whole)
    bias = fresh.rng("bias").standard_normal(-(-whole.shape[1] // 16) * 16).astype(np.float32)
    for pair in (0, 32):
        found = multiply(name, replace(matrix, pair=pair), x, BIAS=bias.ctypes.data)
        np.testing.assert_array_equal(found, whole + bias[: whole.shape[1]])
    for rows in ([], [28], [0, 3, 4], [28, 27, 5, 5, 0], range(29)):
        np.testing.assert_array_equal(multiply(name, matrix, x, 2, rows, GATHERS=1), whole[list(rows)])
    for rows in (1, 3, 29):
        np.testing.assert_array_equal(multiply(name, matrix, x[:rows], 2, twice=True), whole[:rows])
    np.testing.assert_array_equal(multiply(name, matrix, x, shift=4), whole)


@pytest.mark.parametrize("name", ISAS)
def test_scaled_and_capped_logits(name):
    matrix, x = problem("f32", *MIXED)
    whole = multiply(name, matrix, x)
    halved = multiply(name, matrix, x, 2, range(29), GATHERS=1, SCALE=0.5)
    np.testing.assert_array_equal(halved, whole * np.float32(0.5))
    found = multiply(name, matrix, x, 2, range(29), GATHERS=1, SCALE=0.5, SOFTCAP=30.0)
    exact = 30 * np.tanh(halved.astype(np.float64) / 30)
    # e^-2|z| is within 2e-7 and 4 roundings of z; 1 - e^-2|z| has that as its absolute error.
    assert (np.abs(found - exact) <= 30 * (2e-7 + 6 * U)).all()
    assert (np.sign(found) == np.sign(halved)).all()


# Prologues.


def identity(k):
    """A matrix that shows its activations."""
    return Matrix("f32", quant.Quantized(np.eye(k, dtype=np.float32)))


def prologues(rows, k):
    """What a prologue reads, its fields, its result in float64, and how far off a kernel may be."""
    rng = fresh.rng("prologues", rows, k)
    x = (rng.standard_normal((rows, k)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)
    norm = np.full(-(-k // 16) * 16, np.nan, np.float32)
    norm[:k] = rng.uniform(0.5, 2, k)
    mean_square = np.square(x.astype(np.float64)).mean(1, keepdims=True)
    normed = x / np.sqrt(mean_square + np.float32(1e-5)) * norm[:k]
    # Half of what k / 16 steps and 4 folds slip from a sum of squares; the root; two products.
    bounds = U * ((k / 16 + 4 + 1) / 2 + 1 + 2) * np.abs(normed)
    yield x, {"PROLOGUE": layout.RMS_NORM, "NORM": norm.ctypes.data, "NORM_EPS": 1e-5}, normed, bounds
    for bias in (rng.uniform(-2, 2, len(norm)).astype(np.float32), None):
        fields, exact, bounds = layer_norm(x, norm, bias)
        yield x, {"PROLOGUE": layout.LAYER_NORM, **fields}, exact, bounds

    both = (rng.standard_normal((rows, 2 * k)) * 10.0 ** rng.integers(-3, 3, (rows, 2 * k))).astype(np.float32)
    x, up = np.split(both.astype(np.float64), 2, axis=1)
    for activation, (gate, slips, least) in gates(x).items():
        for kind, factor in ((layout.GATED, up), (layout.ACTIVATED, 1)):
            exact = gate * x * factor
            bounds = slips * np.abs(exact) + least * np.abs(x * factor)
            halves = both if kind == layout.GATED else both[:, :k]
            yield halves, {"PROLOGUE": kind, "ACTIVATION": activation}, exact, bounds


def gates(x):
    """What activations multiply x by, in float64; how far off a kernel may be, relatively and at least."""
    with np.errstate(over="ignore"):
        gelu = 2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
        exact = np.array([0.5 * math.erfc(-v / 2**0.5) for v in x.flat]).reshape(x.shape)
        return {
            # exp is within 2e-7, and 0 from about -87 down.
            layout.SILU: (1 / (1 + np.exp(-x)), 2e-7 + 6 * U, np.exp(-86.9)),
            # z takes 5 roundings, and e^z has |z| times its error.
            layout.GELU_TANH: (1 / (1 + np.exp(-gelu)), 2e-7 + U * (6 + 5 * np.abs(gelu)), np.exp(-86.9)),
            # The approximation is within 1.5e-7 of erf, that is half of it here; its terms are rounded some ten times.
            layout.GELU: (exact, 2e-7 + 6 * U, 0.75e-7 + 10 * U),
            layout.RELU2: (np.maximum(x, 0), 2 * U, 0),
        }


def layer_norm(x, norm, bias):
    """Further fields of LayerNorm's prologue, its result, and how far off a kernel may be."""
    k = x.shape[1]
    centred = x - x.mean(1, dtype=np.float64, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(1, keepdims=True) + np.float32(1e-5))
    normed = centred / deviation * norm[:k]
    # k / 16 steps, 4 folds and a division slip from the mean; then each difference is rounded.
    off = U * ((k / 16 + 4 + 1) * np.abs(x).mean(1, dtype=np.float64, keepdims=True) + np.abs(centred))
    of_deviation = U * ((k / 16 + 4 + 1) / 2 + 1) + np.sqrt(np.square(off).mean(1, keepdims=True)) / deviation
    address = bias.ctypes.data if bias is not None else 0
    result = normed + bias[:k] if bias is not None else normed
    bounds = np.abs(norm[:k]) * off / deviation + np.abs(normed) * (of_deviation + 2 * U) + U * np.abs(result)
    return {"NORM": norm.ctypes.data, "NORM_EPS": 1e-5, "NORM_BIAS": address}, result, bounds


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("rows", "k"), [(1, 64), (5, 72), (4, 1), (3, 1000)])
def test_prologues(name, rows, k):
    """Norms and gates, and in every format the bits of a plain product of what they make."""
    for x, fields, exact, bound in prologues(rows, k):
        found = multiply(name, identity(k), x, **fields)
        assert (np.abs(found - exact) <= bound).all()
        for fmt in FORMATS:
            matrix, _ = problem(fmt, rows, 17, k, 0)
            fused = multiply(name, matrix, x, **fields)
            np.testing.assert_array_equal(fused, multiply(name, matrix, found.copy()))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fmt", FORMATS)
def test_an_activation_that_is_not_finite_shows(name, fmt, bad):
    """Whichever it is of the 16 that share a scale, and in its row alone; infinity may come out as NaN."""
    matrix, _ = problem(fmt, 17, 16, 64, 0)
    x = np.ones((17, 64), np.float32)
    x[np.arange(16), 16 + np.arange(16)] = bad
    found = multiply(name, matrix, x)
    weighs = (matrix.values[:, 16:32] != 0).T if fmt in FLOATS else True
    assert (~np.isfinite(found[:16]) | ~np.broadcast_to(weighs, (16, 16))).all()
    assert np.isfinite(found[16]).all()
