"""AVX2 (Haswell, Zen and later): vpmaddubsw to pairs of int16, vpmaddwd to int32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgellm.isa._llvm import BYTES, I32, bytes_of, call, constant, in_parts

MACHINE, FEATURES, ROWS = "x86_64", (("avx2", "fma", "f16c"),), 4
_SHORTS = ir.VectorType(ir.IntType(16), 16)


def _dot4_256(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, u, s)
    return b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), pairs, constant(_SHORTS, 1)))


def dot4(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return in_parts(b, 2, _dot4_256, acc, u, bytes_of(b, s))


def dot4_u8(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    """In two halves of 4 bits: a pair of products of 8 bits would not fit into 16."""
    zero = ir.Constant(acc.type, [0] * acc.type.count)
    high = dot4(b, zero, b.lshr(u, constant(BYTES, 4)), s)
    return dot4(b, b.add(acc, b.shl(high, constant(acc.type, 4))), b.and_(u, constant(BYTES, 15)), s)
