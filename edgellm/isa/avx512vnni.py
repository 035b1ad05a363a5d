"""AVX-512 with VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later): vpdpbusd on 64 bytes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgellm.isa._llvm import INTS, bytes_of, call

MACHINE, FEATURES, ROWS = "x86_64", (("avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c"),), 8


def dot4(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    return call(b, "llvm.x86.avx512.vpdpbusd.512", INTS, acc, u, bytes_of(b, s))


dot4_u8 = dot4
