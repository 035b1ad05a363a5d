"""What the emitters of all ISAs are written with: LLVM's types, memory, parts of vectors. Knows no Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

LANES = 16
I8, I32, I64, F16, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
BYTES, INTS, FLOATS = ir.VectorType(I8, 4 * LANES), ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
HALVES, CODES = ir.VectorType(F16, LANES), ir.VectorType(I8, LANES)


def call(b: ir.IRBuilder, name: str, result: ir.Type, *values: Any) -> Any:
    """Call an LLVM intrinsic by name."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), values)


def constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def load(b: ir.IRBuilder, p: Any, kind: ir.Type) -> Any:
    value = b.load(b.inttoptr(p, kind.as_pointer()))
    value.align = 1
    return value


def store(b: ir.IRBuilder, p: Any, value: Any) -> None:
    b.store(value, b.inttoptr(p, value.type.as_pointer())).align = 1


def splat(b: ir.IRBuilder, scalar: Any) -> Any:
    kind = ir.VectorType(scalar.type, LANES)
    undefined = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undefined, scalar, I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))


def part(b: ir.IRBuilder, vector: Any, first: int, count: int) -> Any:
    """Some consecutive lanes of a vector."""
    lanes = ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


def joined(b: ir.IRBuilder, parts: list[Any]) -> Any:
    """Vectors of equal size, one after the other; their number is a power of two."""
    while len(parts) > 1:
        parts = [_pair(b, low, high) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _pair(b: ir.IRBuilder, low: Any, high: Any) -> Any:
    lanes = ir.Constant(ir.VectorType(I32, 2 * low.type.count), list(range(2 * low.type.count)))
    return b.shuffle_vector(low, high, lanes)


def in_parts(b: ir.IRBuilder, n_parts: int, emit: Callable[..., Any], *vectors: Any) -> Any:
    """Apply an operation of a narrower ISA to each part of its operands."""
    pieces = [
        [part(b, v, i * v.type.count // n_parts, v.type.count // n_parts) for v in vectors] for i in range(n_parts)
    ]
    return joined(b, [emit(b, *piece) for piece in pieces])


def bytes_of(b: ir.IRBuilder, vector: Any) -> Any:
    """An integer vector's bytes."""
    return b.bitcast(vector, ir.VectorType(I8, vector.type.count * vector.type.element.width // 8))
