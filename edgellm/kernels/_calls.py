"""Primitives of the executor: calls by address, atomic cells, waiting."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types

from edgellm.isa import cpu
from edgellm.isa._llvm import I32, I64, call
from edgellm.isa._vectors import ADDRESS, operation


def calls() -> dict[str, Any]:
    return {
        "call_op": _call_of(4),
        "call_dot": _call_of(5),
        "atomic_get": operation(_atomic_get, ADDRESS, ADDRESS),
        "atomic_set": operation(_atomic_set, types.void, ADDRESS, ADDRESS),
        "atomic_next": operation(_atomic_next, ADDRESS, ADDRESS),
        "atomic_raise": operation(_atomic_raise, types.void, ADDRESS, ADDRESS, ADDRESS),
        "pause": operation(_pause, types.void),
        "yield_cpu": operation(_yield, types.void),
    }


def _call_of(arity: int) -> Any:
    """Call a function at an address with that many int64."""
    from numba.extending import intrinsic

    kind = ir.FunctionType(ir.VoidType(), [I64] * arity)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        b.call(b.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    typed = types.void(*[types.int64] * (arity + 1)), codegen
    if arity == 4:
        return intrinsic(lambda _, f, a, b, c, d: typed)
    return intrinsic(lambda _, f, a, b, c, d, e: typed)


def _atomic_get(b: ir.IRBuilder, p: Any) -> Any:
    return b.load_atomic(b.inttoptr(p, I64.as_pointer()), "acquire", 8)


def _atomic_set(b: ir.IRBuilder, p: Any, x: Any) -> None:
    b.store_atomic(x, b.inttoptr(p, I64.as_pointer()), "release", 8)


def _atomic_next(b: ir.IRBuilder, p: Any) -> Any:
    return b.atomic_rmw("add", b.inttoptr(p, I64.as_pointer()), I64(1), "monotonic")


def _atomic_raise(b: ir.IRBuilder, p: Any, old: Any, new: Any) -> None:
    b.cmpxchg(b.inttoptr(p, I64.as_pointer()), old, new, "monotonic", "monotonic")


def _pause(b: ir.IRBuilder) -> None:
    """Tell the core that this thread is waiting."""
    machine = cpu()[0]
    if machine.startswith("x86_64"):
        call(b, "llvm.x86.sse2.pause", ir.VoidType())
    elif machine.startswith("aarch64"):
        call(b, "llvm.aarch64.hint", ir.VoidType(), I32(1))


def _yield(b: ir.IRBuilder) -> None:
    """Let another thread have this core."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
    call(b, name, I32)
