"""Vectors for Numba: values of 16 lanes that LLVM keeps in registers, and the operations on them.

A tile has 16 rows, so every kernel works on 16 lanes, whatever the CPU: LLVM cuts a vector into the registers there
are, two of AVX2 or four of NEON. All operations here are LLVM's own, and the same everywhere; the one that needs
instructions by name, the dot product of bytes, is what an ISA's file adds. Integer sums are exact; float operations
round once each, in the written order (no fastmath), so that a result has the same bits on every machine.

Addresses are int64. Nothing checks them: callers own the memory and stay inside it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from edgellm.isa import host
from edgellm.isa._llvm import (
    BYTES,
    CODES,
    F16,
    F32,
    FLOATS,
    HALVES,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    call,
    constant,
    load,
    part,
    splat,
    store,
)  # fmt: skip
from edgellm.isa._quantize import quantize_64


class Vec(types.Type):  # type: ignore[misc]
    """A Numba type without Python behaviour, that LLVM holds in registers."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=name)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vec: Vec) -> None:
        super().__init__(manager, vec, vec.llvm)


B, N, F = Vec("Bytes", BYTES), Vec("Ints", INTS), Vec("Floats", FLOATS)
ADDRESS, INT, FLOAT = types.int64, types.int32, types.float32


def operation(emit: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    """An intrinsic with one signature, from emit(builder, *values) -> value, or None for no result."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        value = emit(builder, *values)
        return context.get_dummy_value() if result is types.void else value

    typed = result(*arguments), codegen
    by_arity = [
        lambda _: typed,
        lambda _, a: typed,
        lambda _, a, b: typed,
        lambda _, a, b, c: typed,
        lambda _, a, b, c, d: typed,
        lambda _, a, b, c, d, e: typed,
    ]
    return intrinsic(by_arity[len(arguments)])


def _tree(b: ir.IRBuilder, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Fold a vector in halves, an order that every machine shares: lane i with lane i + 8, then + 4, + 2, + 1."""
    while (half := vector.type.count // 2) >= 1:
        vector = combine(part(b, vector, 0, half), part(b, vector, half, half))
        if half == 1:
            break
    return b.extract_element(vector, I32(0))


def _maximum(b: ir.IRBuilder) -> Callable[[Any, Any], Any]:
    return lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y)


def _exp(b: ir.IRBuilder, x: Any) -> Any:
    """exp(x) for x <= 0, relative error below 2e-7: 2^n * p(r), r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2].

    From -87 down the result is 0, as a probability that small is. NaN stays NaN: it passes a maximum as the second
    operand, and no comparison with it is true.
    """

    def fma(x: Any, y: Any, z: Any) -> Any:
        return call(b, "llvm.fma.v16f32", FLOATS, x, y, z)

    low = constant(FLOATS, -87.0)
    clamped = _maximum(b)(low, x)
    n = call(b, "llvm.rint.v16f32", FLOATS, b.fmul(clamped, constant(FLOATS, 1.4426950408889634)))
    r = fma(n, constant(FLOATS, -0.693145751953125), clamped)
    r = fma(n, constant(FLOATS, -1.428606765330187e-06), r)
    p = constant(FLOATS, 1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = fma(p, r, constant(FLOATS, factor))
    scale = b.bitcast(b.shl(b.add(b.fptosi(n, INTS), constant(INTS, 127)), constant(INTS, 23)), FLOATS)
    return b.select(b.fcmp_ordered("<=", x, low), constant(FLOATS, 0.0), b.fmul(p, scale))


def _exp2(b: ir.IRBuilder, x: Any) -> Any:
    """2^x for x <= 0, or hardly more, relative error below 2e-7: 2^n * p(x - n), p of least relative error in
    [-1/2, 1/2] among those with p(0) = 1.

    Adding `whole` rounds x to n, and leaves n + 127, what a float has for 2^n, in the lowest bits. From -127 down, and
    for what rounds to it, that is 0, and so is the result: numbers below 2^-126 take long. NaN stays NaN, as for _exp.
    """
    whole = constant(FLOATS, 1.5 * 2**23 + 127)
    clamped = _maximum(b)(constant(FLOATS, -127.0), x)
    shifted = b.fadd(clamped, whole)
    r = b.fsub(clamped, b.fsub(shifted, whole))
    p = constant(FLOATS, 0.0013264727247055785)
    for factor in (0.009671512688176011, 0.05550733743574584, 0.24022242084634746, 0.693146977598716, 1.0):
        p = call(b, "llvm.fma.v16f32", FLOATS, p, r, constant(FLOATS, factor))
    return b.fmul(p, b.bitcast(b.shl(b.bitcast(shifted, INTS), constant(INTS, 23)), FLOATS))


def _prefetch(b: ir.IRBuilder, p: Any) -> None:
    call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(p, I8.as_pointer()), I32(0), I32(2), I32(1))


def _scatter(b: ir.IRBuilder, p: Any, step: Any, lanes: Any) -> None:
    for lane in range(lanes.type.count):
        store(b, p, b.extract_element(lanes, I32(lane)))
        p = b.add(p, step)


def _codes(b: ir.IRBuilder, x: Any) -> Any:
    """The nearest whole numbers, halves to even, as bytes from -127 to 127; any for NaN."""
    whole = b.fptosi(call(b, "llvm.rint.v16f32", FLOATS, x), INTS)
    for sign, most in ((">", 127), ("<", -127)):
        whole = b.select(b.icmp_signed(sign, whole, constant(INTS, most)), constant(INTS, most), whole)
    return b.trunc(whole, CODES)


def _scatter_codes(b: ir.IRBuilder, p: Any, step: Any, x: Any) -> None:
    """From 1 to 255."""
    unsigned = b.xor(_codes(b, x), constant(CODES, -128))
    _scatter(b, p, step, b.bitcast(unsigned, ir.VectorType(I32, LANES // 4)))


def _first(b: ir.IRBuilder, count: Any, x: Any, other: Any) -> Any:
    """The first `count` lanes of x, the others of `other`."""
    lanes = ir.Constant(INTS, list(range(LANES)))
    return b.select(b.icmp_signed("<", lanes, splat(b, count)), x, other)


def primitives(dot4: Callable[..., Any], dot4_u8: Callable[..., Any], rows: int) -> dict[str, Any]:
    """The operations of an ISA by the names that kernels call them.

    dot4(builder, acc, u, s): acc[row] + sum over 4 of u * s, u unsigned bytes up to 24, s signed; dot4_u8 for any u.
    rows: vectors of sums that the registers hold.
    """
    fma = "llvm.fma.v16f32"
    scalars = {
        "get_i64": operation(lambda b, p: load(b, p, I64), ADDRESS, ADDRESS),
        "get_i32": operation(lambda b, p: load(b, p, I32), INT, ADDRESS),
        "get_u8": operation(lambda b, p: b.zext(load(b, p, I8), I64), ADDRESS, ADDRESS),
        "get_f32": operation(lambda b, p: load(b, p, F32), FLOAT, ADDRESS),
        "get_f16": operation(lambda b, p: b.fpext(load(b, p, F16), F32), FLOAT, ADDRESS),
        "set_i64": operation(store, types.void, ADDRESS, ADDRESS),
        "set_i32": operation(store, types.void, ADDRESS, INT),
        "set_f32": operation(store, types.void, ADDRESS, FLOAT),
        "set_f16": operation(lambda b, p, x: store(b, p, b.fptrunc(x, F16)), types.void, ADDRESS, FLOAT),
    }
    vectors = {
        "zero": operation(lambda b: constant(FLOATS, 0.0), F),
        "zero_i32": operation(lambda b: constant(INTS, 0), N),
        "load_bytes": operation(lambda b, p: load(b, p, BYTES), B, ADDRESS),
        "load_f32": operation(lambda b, p: load(b, p, FLOATS), F, ADDRESS),
        "load_f16": operation(lambda b, p: b.fpext(load(b, p, HALVES), FLOATS), F, ADDRESS),
        "store_f32": operation(store, types.void, ADDRESS, F),
        "store_f16": operation(lambda b, p, x: store(b, p, b.fptrunc(x, HALVES)), types.void, ADDRESS, F),
        "scatter_f16": operation(
            lambda b, p, step, x: _scatter(b, p, step, b.fptrunc(x, HALVES)), types.void, ADDRESS, ADDRESS, F
        ),
        "store_codes": operation(lambda b, p, x: store(b, p, _codes(b, x)), types.void, ADDRESS, F),
        "scatter_codes": operation(_scatter_codes, types.void, ADDRESS, ADDRESS, F),
        "quantize_64": operation(quantize_64, types.void, ADDRESS, ADDRESS),
        "splat_i32": operation(lambda b, p: splat(b, load(b, p, I32)), N, ADDRESS),
        "splat_f32": operation(lambda b, p: splat(b, load(b, p, F32)), F, ADDRESS),
        "fill": operation(splat, F, FLOAT),
        "low4": operation(lambda b, v: b.and_(v, constant(BYTES, 15)), B, B),
        "high4": operation(lambda b, v: b.lshr(v, constant(BYTES, 4)), B, B),
        "first2": operation(lambda b, v: b.and_(b.shl(v, constant(BYTES, 3)), constant(BYTES, 24)), B, B),
        "second2": operation(lambda b, v: b.and_(b.shl(v, constant(BYTES, 1)), constant(BYTES, 24)), B, B),
        "third2": operation(lambda b, v: b.and_(b.lshr(v, constant(BYTES, 1)), constant(BYTES, 24)), B, B),
        "fourth2": operation(lambda b, v: b.and_(b.lshr(v, constant(BYTES, 3)), constant(BYTES, 24)), B, B),
        "dot4": operation(dot4, N, N, B, N),
        "dot4_u8": operation(dot4_u8, N, N, B, N),
        "to_f32": operation(lambda b, v: b.sitofp(v, FLOATS), F, N),
        "add": operation(lambda b, x, y: b.fadd(x, y), F, F, F),
        "sub": operation(lambda b, x, y: b.fsub(x, y), F, F, F),
        "mul": operation(lambda b, x, y: b.fmul(x, y), F, F, F),
        "div": operation(lambda b, x, y: b.fdiv(x, y), F, F, F),
        "fma": operation(lambda b, x, y, z: call(b, fma, FLOATS, x, y, z), F, F, F, F),
        "maximum": operation(lambda b, x, y: _maximum(b)(x, y), F, F, F),
        "absolute": operation(lambda b, x: call(b, "llvm.fabs.v16f32", FLOATS, x), F, F),
        "exp": operation(_exp, F, F),
        "exp2": operation(_exp2, F, F),
        "first": operation(_first, F, INT, F, F),
        "where_positive": operation(
            lambda b, x, y, z: b.select(b.fcmp_ordered(">", x, constant(FLOATS, 0.0)), y, z), F, F, F, F
        ),
        "lanes_sum": operation(lambda b, x: _tree(b, x, b.fadd), FLOAT, F),
        "lanes_max": operation(lambda b, x: _tree(b, x, _maximum(b)), FLOAT, F),
        "prefetch": operation(_prefetch, types.void, ADDRESS),
        "most_queries": operation(lambda b: I64(rows), ADDRESS),
        "fetched_lines": operation(lambda b: I64(2 if host()[1].startswith("znver") else 1), ADDRESS),
    }
    of_queries = [sums_primitives(queries, n, dot4_u8) for queries, n in ((1, 4), (4, rows // 4), (8, rows // 4))]
    return dict(ChainMap(scalars, vectors, *of_queries))


class Rows(types.Type):  # type: ignore[misc]
    """`count` vectors, all in registers."""

    def __init__(self, vec: Vec, count: int) -> None:
        self.llvm = ir.ArrayType(vec.llvm, count)
        super().__init__(name=f"{vec.name} x {count}")


@register_model(Rows)
class _RowsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, rows: Rows) -> None:
        super().__init__(manager, rows, rows.llvm)


def sums_primitives(queries: int, n: int, dot4_u8: Callable[..., Any]) -> dict[str, Any]:
    """The operations of attention on sums in registers: `n` vectors of each of so many queries. Names end with that
    number. Vector v of query q stands at p + q * step + 64 * v."""
    sums, places = Rows(F, queries * n), [(query, v) for query in range(queries) for v in range(n)]
    ints = Rows(N, queries * n)

    def gathered(b: ir.IRBuilder, vectors: list[Any]) -> Any:
        rows = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
        for i, vector in enumerate(vectors):
            rows = b.insert_value(rows, vector, i)
        return rows

    def at(b: ir.IRBuilder, p: Any, step: Any, i: int) -> Any:
        return b.add(p, b.mul(step, I64(i)))

    def of(b: ir.IRBuilder, p: Any, step: Any, query: int, v: int) -> Any:
        return b.add(at(b, p, step, query), I64(64 * v))

    def loaded(b: ir.IRBuilder, p: Any, step: Any) -> Any:
        return gathered(b, [load(b, of(b, p, step, *place), FLOATS) for place in places])

    def stored(b: ir.IRBuilder, p: Any, step: Any, rows: Any) -> None:
        for i, place in enumerate(places):
            store(b, of(b, p, step, *place), b.extract_value(rows, i))

    def loads(b: ir.IRBuilder, x: Any, step: Any, kind: ir.Type) -> list[Any]:
        return [load(b, at(b, x, step, v), kind) for v in range(n)]

    def splats(b: ir.IRBuilder, p: Any, step: Any, kind: ir.Type) -> list[Any]:
        return [splat(b, load(b, at(b, p, step, query), kind)) for query in range(queries)]

    def each(b: ir.IRBuilder, emit: Callable[[int, int, int], Any]) -> Any:
        return gathered(b, [emit(i, query, v) for i, (query, v) in enumerate(places)])

    def added(b: ir.IRBuilder, x: Any, y: Any, rows: Any, i: int) -> Any:
        return call(b, "llvm.fma.v16f32", FLOATS, x, y, b.extract_value(rows, i))

    def fma(kind: ir.Type, widened: Callable[[ir.IRBuilder, Any], Any]) -> Any:
        def emit(b: ir.IRBuilder, rows: Any, x: Any, x_step: Any, factor: Any, factor_step: Any) -> Any:
            vectors = [widened(b, vector) for vector in loads(b, x, x_step, kind)]
            factors = splats(b, factor, factor_step, F32)
            return each(b, lambda i, query, v: added(b, vectors[v], factors[query], rows, i))

        return operation(emit, sums, sums, ADDRESS, ADDRESS, ADDRESS, ADDRESS)

    def starts(b: ir.IRBuilder, p: Any, step: Any) -> Any:
        found = splats(b, p, step, I32)
        return each(b, lambda i, query, v: found[query])

    def dot(b: ir.IRBuilder, rows: Any, x: Any, x_step: Any, codes: Any, codes_step: Any) -> Any:
        vectors, quads = loads(b, x, x_step, BYTES), splats(b, codes, codes_step, I32)
        return each(b, lambda i, query, v: dot4_u8(b, b.extract_value(rows, i), vectors[v], quads[query]))

    def scaled(b: ir.IRBuilder, rows: Any, p: Any, step: Any) -> Any:
        factors = splats(b, p, step, F32)
        return each(b, lambda i, query, v: b.fmul(b.sitofp(b.extract_value(rows, i), FLOATS), factors[query]))

    def add_scaled(b: ir.IRBuilder, sums: Any, rows: Any, p: Any, step: Any) -> Any:
        factors = splats(b, p, step, F32)
        return each(
            b, lambda i, query, v: added(b, b.sitofp(b.extract_value(rows, i), FLOATS), factors[query], sums, i)
        )

    def add_weighted(b: ir.IRBuilder, rows: Any, w: Any, w_step: Any, sums: Any) -> Any:
        weights = [b.fpext(half, FLOATS) for half in loads(b, w, w_step, HALVES)]
        return each(b, lambda i, query, v: added(b, weights[v], b.extract_value(sums, i), rows, i))

    primitives = {
        "vectors": operation(lambda b: I64(n), ADDRESS),
        "zeros": operation(lambda b: gathered(b, [constant(FLOATS, 0.0)] * len(places)), sums),
        "load": operation(loaded, sums, ADDRESS, ADDRESS),
        "store": operation(stored, types.void, ADDRESS, ADDRESS, sums),
        "fma": fma(HALVES, lambda b, x: b.fpext(x, FLOATS)),
        "fma_f32": fma(FLOATS, lambda b, x: x),
        "fma_codes": fma(CODES, lambda b, x: b.sitofp(x, FLOATS)),
        "starts": operation(starts, ints, ADDRESS, ADDRESS),
        "dot": operation(dot, ints, ints, ADDRESS, ADDRESS, ADDRESS, ADDRESS),
        "scaled": operation(scaled, sums, ints, ADDRESS, ADDRESS),
        "add_scaled": operation(add_scaled, sums, sums, ints, ADDRESS, ADDRESS),
        "add_weighted": operation(add_weighted, sums, sums, ADDRESS, ADDRESS, sums),
    }
    return {f"{name}_{queries}": primitive for name, primitive in primitives.items()}


def row_primitives(dot4: Callable[..., Any], dot4_u8: Callable[..., Any], count: int) -> dict[str, Any]:
    """The operations of a dot kernel that takes `count` rows of activations at once, interleaved in memory: the bytes
    or numbers that a step of the kernel needs of each row stand side by side."""
    ints, floats = Rows(N, count), Rows(F, count)

    def each(b: ir.IRBuilder, emit: Callable[[int], Any]) -> Any:
        vectors = [emit(row) for row in range(count)]
        rows = ir.Constant(ir.ArrayType(vectors[0].type, count), ir.Undefined)
        for row, vector in enumerate(vectors):
            rows = b.insert_value(rows, vector, row)
        return rows

    def splat_at(b: ir.IRBuilder, p: Any, row: int, kind: ir.Type) -> Any:
        return splat(b, load(b, b.add(p, I64(4 * row)), kind))

    def fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
        return call(b, "llvm.fma.v16f32", FLOATS, x, y, z)

    def float_at(b: ir.IRBuilder, ints: Any, row: int) -> Any:
        return b.sitofp(b.extract_value(ints, row), FLOATS)

    def filled(kind: ir.VectorType, value: float) -> Callable[..., Any]:
        return lambda b: each(b, lambda row: constant(kind, value))

    def dots(emit: Callable[..., Any]) -> Callable[..., Any]:
        return lambda b, acc, u, p: each(b, lambda row: emit(b, b.extract_value(acc, row), u, splat_at(b, p, row, I32)))

    def scaled(b: ir.IRBuilder, dot: Any, p: Any) -> Any:
        return each(b, lambda row: b.fmul(float_at(b, dot, row), splat_at(b, p, row, F32)))

    def add_scaled(b: ir.IRBuilder, sums: Any, dot: Any, p: Any) -> Any:
        return each(b, lambda row: fma(b, float_at(b, dot, row), splat_at(b, p, row, F32), b.extract_value(sums, row)))

    def add_weighted(b: ir.IRBuilder, acc: Any, w: Any, sums: Any) -> Any:
        return each(b, lambda row: fma(b, w, b.extract_value(sums, row), b.extract_value(acc, row)))

    def rows_fma(b: ir.IRBuilder, acc: Any, w: Any, p: Any) -> Any:
        return each(b, lambda row: fma(b, w, splat_at(b, p, row, F32), b.extract_value(acc, row)))

    def store_rows(b: ir.IRBuilder, p: Any, acc: Any) -> None:
        for row in range(count):
            store(b, b.add(p, I64(4 * LANES * row)), b.extract_value(acc, row))

    return {
        "row_count": operation(lambda b: I64(count), ADDRESS),
        "rows_zero": operation(filled(FLOATS, 0.0), floats),
        "rows_zero_ints": operation(filled(INTS, 0), ints),
        "rows_start": operation(lambda b, p: each(b, lambda row: splat_at(b, p, row, I32)), ints, ADDRESS),
        "rows_dot4": operation(dots(dot4), ints, ints, B, ADDRESS),
        "rows_dot4_u8": operation(dots(dot4_u8), ints, ints, B, ADDRESS),
        "rows_scaled": operation(scaled, floats, ints, ADDRESS),
        "rows_add_scaled": operation(add_scaled, floats, floats, ints, ADDRESS),
        "rows_add_weighted": operation(add_weighted, floats, floats, F, floats),
        "rows_fma": operation(rows_fma, floats, floats, F, ADDRESS),
        "store_rows": operation(store_rows, types.void, ADDRESS, floats),
    }
