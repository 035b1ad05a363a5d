"""VNNI on 32 bytes: vpdpbusd of AVX-VNNI (Alder Lake, N100 and later), or of AVX-512 VL."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgellm.isa._llvm import I32, bytes_of, call, in_parts

MACHINE, ROWS = "x86_64", 4
FEATURES = ("avxvnni", "avx2", "fma", "f16c"), ("avx512vnni", "avx512vl", "avx2", "fma", "f16c")


def _dot4_256(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return call(b, "llvm.x86.avx512.vpdpbusd.256", ir.VectorType(I32, 8), acc, u, s)


def dot4(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return in_parts(b, 2, _dot4_256, acc, u, bytes_of(b, s))


dot4_u8 = dot4
