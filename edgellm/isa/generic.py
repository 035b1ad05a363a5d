"""Any CPU that LLVM compiles for: multiplications of 32 bits, no instruction by name."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from edgellm.isa._llvm import I32, INTS, LANES, bytes_of

MACHINE, FEATURES, ROWS = "", ((),), 4


def dot4(b: ir.IRBuilder, acc: Any, u: Any, s: Any) -> Any:
    wide = ir.VectorType(I32, 4 * LANES)
    products = b.mul(b.zext(u, wide), b.sext(bytes_of(b, s), wide))
    for k in range(4):
        lanes = ir.Constant(INTS, [4 * lane + k for lane in range(LANES)])
        acc = b.add(acc, b.shuffle_vector(products, ir.Constant(wide, ir.Undefined), lanes))
    return acc


dot4_u8 = dot4
