"""NEON (Cortex-A72, every 64-bit Arm): smull to products of int16, addp and sadalp to int32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgellm.isa._llvm import BYTES, I32, bytes_of, call, constant, in_parts, part

MACHINE, FEATURES, ROWS = "aarch64", ((),), 4
_SHORTS, _INTS = ir.VectorType(ir.IntType(16), 8), ir.VectorType(I32, 4)


def _products(b: ir.IRBuilder, u: Any, s: Any) -> list[Any]:
    """smull: 8 products of the first two rows, 8 of the others."""
    wide = [[b.sext(part(b, v, first, 8), _SHORTS) for v in (u, s)] for first in (0, 8)]
    return [b.mul(*both) for both in wide]


def _pairs(b: ir.IRBuilder, shorts: Any) -> Any:
    """saddlp, and sadalp where the result is added: sums of two int16."""
    return call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", _INTS, shorts)


def _dot4_128(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return b.add(acc, _pairs(b, call(b, "llvm.aarch64.neon.addp.v8i16", _SHORTS, *_products(b, u, s))))


def _dot4_signed_128(b: ir.IRBuilder, acc: Any, v: Any, s: Any) -> Any:
    """For signed v: two products of 8 bits do not fit into int16."""
    pairs = [_pairs(b, shorts) for shorts in _products(b, v, s)]
    return b.add(acc, call(b, "llvm.aarch64.neon.addp.v4i32", _INTS, *pairs))


def dot4(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return in_parts(b, 4, _dot4_128, acc, u, bytes_of(b, s))


def dot4_u8(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    """u - 128 is a signed byte; what that leaves out, 128 * s, is the same for all rows and computed once."""
    zero = ir.Constant(acc.type, [0] * acc.type.count)
    left_out = in_parts(b, 4, _dot4_signed_128, zero, constant(BYTES, -128), bytes_of(b, s))
    signed = b.xor(u, constant(BYTES, -128))
    return in_parts(b, 4, _dot4_signed_128, b.sub(acc, left_out), signed, bytes_of(b, s))
