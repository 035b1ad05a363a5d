"""64 float32 -> int8 codes with a scale for 16, and the sums that dot products start from: an emitter for all ISAs.

The four groups of 16 are folded together, so that each operation works on whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from edgellm.isa._llvm import CODES, FLOATS, I32, I64, INTS, call, constant, joined, load, store

GROUPS = 4
SMALLEST = 1e-36
"""Activations that are all closer to 0 count as 0: the reciprocal of what is smaller may be infinite."""
_I4, _F4, _D4 = (ir.VectorType(kind, GROUPS) for kind in (I32, ir.FloatType(), ir.DoubleType()))


def quantize_64(b: ir.IRBuilder, source: Any, target: Any) -> None:
    """See kernels.primitives; scales and sums are rounded from float64."""
    groups = [load(b, b.add(source, I64(64 * i)), FLOATS) for i in range(GROUPS)]
    largest = _largest(b, groups)
    small = b.fcmp_ordered("<", largest, constant(_F4, SMALLEST))  # NaN is not
    inverse = b.select(small, constant(_F4, 0.0), b.fdiv(constant(_F4, 127.0), largest))
    codes = [_codes(b, x, b.shuffle_vector(inverse, inverse, _lane(i))) for i, x in enumerate(groups)]
    for i, x in enumerate(codes):
        store(b, b.add(target, I64(16 * i)), b.trunc(x, CODES))
    totals = _folded(b, codes, b.add)
    scales = b.fdiv(b.fpext(largest, _D4), constant(_D4, 127.0))
    store(b, b.add(target, I64(64)), b.fptrunc(scales, _F4))
    store(b, b.add(target, I64(80)), b.mul(totals, constant(_I4, -8)))
    store(b, b.add(target, I64(96)), b.mul(totals, constant(_I4, -128)))
    store(b, b.add(target, I64(112)), _sums_of_32(b, b.fmul(scales, b.sitofp(totals, _D4))))


def _largest(b: ir.IRBuilder, groups: list[Any]) -> Any:
    """The largest |lane| of each group, or NaN if one is: as integers, floats of one sign are in order, and NaN is
    above them all."""
    sizes = [b.and_(b.bitcast(x, INTS), constant(INTS, 0x7FFFFFFF)) for x in groups]
    return b.bitcast(_folded(b, sizes, lambda x, y: b.select(b.icmp_signed(">", x, y), x, y)), _F4)


def _codes(b: ir.IRBuilder, x: Any, inverse: Any) -> Any:
    return b.fptosi(call(b, "llvm.rint.v16f32", FLOATS, b.fmul(x, inverse)), INTS)


def _folded(b: ir.IRBuilder, groups: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Each group to one lane, in an order of no matter."""
    lanes = joined(b, groups)
    while (half := lanes.type.count // (2 * GROUPS)) >= 1:
        lanes = combine(*(_halves(b, lanes, half, first) for first in (0, half)))
    return lanes


def _halves(b: ir.IRBuilder, lanes: Any, half: int, first: int) -> Any:
    """Of each group, `half` of its lanes."""
    chosen = [2 * half * group + first + i for group in range(GROUPS) for i in range(half)]
    return b.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))


def _lane(i: int) -> ir.Constant:
    return ir.Constant(INTS, [i] * INTS.count)


def _sums_of_32(b: ir.IRBuilder, sums: Any) -> Any:
    """Of groups 0 and 1, of 2 and 3: the first is rounded to float32, then what the second adds to it."""
    two = ir.VectorType(ir.FloatType(), 2)
    evens, odds = (b.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(I32, 2), [i, i + 2])) for i in (0, 1))
    return b.fptrunc(b.fadd(odds, b.fpext(b.fptrunc(evens, two), odds.type)), two)
