"""NEON with the dot product extension (Cortex-A76, Apple M1 and later): sdot on 16 bytes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgellm.isa._llvm import BYTES, I32, bytes_of, call, constant, in_parts

MACHINE, FEATURES, ROWS = "aarch64", (("dotprod",),), 4


def _dot4_128(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", ir.VectorType(I32, 4), acc, u, s)


def dot4(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return in_parts(b, 4, _dot4_128, acc, u, bytes_of(b, s))


def dot4_u8(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    """u - 128 is a signed byte; what that leaves out, 128 * s, is the same for all rows and computed once."""
    zero = ir.Constant(acc.type, [0] * acc.type.count)
    left_out = dot4(b, zero, constant(BYTES, -128), s)
    return dot4(b, b.sub(acc, left_out), b.xor(u, constant(BYTES, -128)), s)
