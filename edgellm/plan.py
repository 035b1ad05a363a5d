"""A model's step as a list: the ops that `forward` asks for, recorded once, with the buffers they read and write.

`forward` runs over `Recorder` as it runs over arrays; what it passes from op to op are names of buffers and of things
that an op fuses: a norm or a gate becomes the prologue of the matmuls that read it, a sum the epilogue of the one
before it. Knows no kernel and no memory: a backend turns the list into what it executes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from edgellm.architectures import Architecture, LayerCache
from edgellm.arrays import F32
from edgellm.errors import BackendError
from edgellm.ops import Activation, Ops
from edgellm.tensor import Tensor, Weights


@dataclass(eq=False)
class Buffer:
    """A float32 array of the step, (rows, cols). A handle is good until an op changes the array in place."""

    name: str
    cols: int
    fresh: bool = True


@dataclass(frozen=True, eq=False)
class Normed:
    x: Buffer
    weight: Tensor
    eps: float
    bias: Tensor | None = None
    """Of a layer norm; without one it is a root mean square norm."""


@dataclass(frozen=True, eq=False)
class Gated:
    x: Buffer
    activation: Activation


@dataclass(frozen=True, eq=False)
class Turned:
    x: Buffer
    head_dim: int
    frequencies: F32


Value = Buffer | Normed | Gated | Turned


@dataclass(eq=False)
class Embed:
    table: Tensor
    out: Buffer


@dataclass(eq=False)
class Angles:
    """Cosines and sines of every row's RoPE angles, for all layers with the same frequencies."""

    frequencies: F32
    out: Buffer


@dataclass(eq=False)
class Matmul:
    weight: Tensor
    source: Buffer | Normed | Gated
    out: Buffer
    adds: bool = False
    """Added to what `out` holds, not stored."""
    logits: bool = False
    """For the wanted rows only; a step may ask for the best token of each instead of its outputs."""
    same_input: bool = False
    """The matmul before it has prepared the same rows."""


@dataclass(eq=False)
class RopeAppend:
    q: Buffer
    k: Buffer
    v: Buffer
    angles: Angles
    head_dim: int
    layer: int


@dataclass(eq=False)
class Attention:
    q: Buffer
    out: Buffer
    layer: int
    scale: float


Op = Embed | Angles | Matmul | RopeAppend | Attention


@dataclass(eq=False)
class Plan:
    ops: list[Op] = field(default_factory=list)
    caches: list[LayerCache] = field(default_factory=list)

    def buffers(self) -> Iterable[Buffer]:
        """Every array of the plan, in the order in which it is first written."""
        return dict.fromkeys(op.k if isinstance(op, RopeAppend) else op.out for op in self.ops)


def record(architecture: Architecture, config: Any, tensors: dict[str, Tensor]) -> Plan:
    """The plan of a model."""
    recorder = Recorder(Plan(caches=architecture.caches(config)))
    ops: Ops[Value] = recorder
    architecture.forward(config, Weights(tensors), ops)
    return recorder.plan


class Recorder:
    """Ops that write a plan. Raises BackendError for a combination that has no fused form."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._arrays: dict[str, Buffer] = {}

    def embed(self, table: Tensor) -> Buffer:
        return self._append(Embed(table, self._buffer("x", table.shape[1])))

    def rms_norm(self, x: Value, weight: Tensor, eps: float) -> Normed:
        return Normed(_buffer(x), weight, eps)

    def layer_norm(self, x: Value, weight: Tensor, bias: Tensor, eps: float) -> Normed:
        return Normed(_buffer(x), weight, eps, bias)

    def glu(self, x: Value, activation: Activation) -> Gated:
        return Gated(_buffer(x), activation)

    def rope(self, x: Value, head_dim: int, frequencies: F32) -> Turned:
        return Turned(_buffer(x), head_dim, frequencies)

    def linear(self, x: Value, weight: Tensor, bias: Tensor | None = None) -> Buffer:
        if bias is not None or isinstance(x, Turned):
            raise BackendError("this backend has no matmul with a bias, or of what RoPE has turned")
        last = self.plan.ops[-1]
        out = self._buffer(weight.name.rpartition(".")[2], weight.shape[0])
        same = isinstance(last, Matmul) and last.source is x and last.weight.format[0] == weight.format[0]
        return self._append(Matmul(weight, x, out, same_input=same))

    def add(self, x: Value, y: Value) -> Buffer:
        """The matmul that made y adds to x in place."""
        made, target = self.plan.ops[-1], _buffer(x)
        if not isinstance(made, Matmul) or made.out is not y or made.adds:
            raise BackendError("this backend adds only what a matmul has just made")
        target.fresh = False
        made.out, made.adds = Buffer(target.name, target.cols), True
        return made.out

    def attention(self, q: Value, k: Value, v: Value, layer: int, scale: float) -> Buffer:
        if not isinstance(q, Turned) or not isinstance(k, Turned):
            raise BackendError("this backend attends only with RoPE")
        angles = self._angles(q)
        self.plan.ops.append(RopeAppend(q.x, k.x, _buffer(v), angles, q.head_dim, layer))
        return self._append(Attention(q.x, self._buffer("attention", q.x.cols), layer, scale))

    def logits(self, x: Value, table: Tensor) -> Buffer:
        if isinstance(x, Turned):
            raise BackendError("this backend has no logits of what RoPE has turned")
        return self._append(Matmul(table, x, self._buffer("logits", table.shape[0]), logits=True))

    def _angles(self, turned: Turned) -> Angles:
        for op in self.plan.ops:
            if isinstance(op, Angles) and op.frequencies is turned.frequencies:
                return op
        angles = Angles(turned.frequencies, self._buffer(self._unused("angles"), turned.head_dim))
        self.plan.ops.insert(1, angles)
        return angles

    def _unused(self, name: str) -> str:
        return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 999))) if n not in self._arrays)

    def _append(self, op: Any) -> Buffer:
        self.plan.ops.append(op)
        out: Buffer = op.out
        return out

    def _buffer(self, name: str, cols: int) -> Buffer:
        """A new handle of the array of that name, which earlier layers have used too."""
        if name in self._arrays:
            self._arrays[name].fresh = False
        self._arrays[name] = Buffer(name, cols)
        return self._arrays[name]


def _buffer(x: Value) -> Buffer:
    if not isinstance(x, Buffer) or not x.fresh:
        raise BackendError("this backend has no fused form of what the model does: use --backend reference")
    return x


def describe(plan: Plan) -> list[str]:
    """The plan in words, a line an op; layers that are alike are told once."""
    lines: list[str] = []
    groups = [(layer, [_line(op) for op in ops]) for layer, ops in groupby(plan.ops, key=_layer)]
    for told, alike in groupby(groups, key=lambda group: group[1]):
        layers = [layer for layer, _ in alike]
        if layers[0] is not None:
            lines.append(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}, each")
        lines += told if layers[0] is None else [f"  {line}" for line in told]
    total = sum(op.weight.data.nbytes for op in plan.ops if isinstance(op, Matmul))
    return [*lines, f"{len(plan.ops)} ops; {total / 1e6:.1f} MB of weights are read for each step"]


def _layer(op: Op) -> int | None:
    if isinstance(op, (RopeAppend, Attention)):
        return op.layer
    name = op.weight.name if isinstance(op, Matmul) else ""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _line(op: Op) -> str:
    if isinstance(op, Embed):
        return f"{op.out.name} = row of {op.table.name} for each token{'':<14}{_matrix(op.table)}"
    if isinstance(op, Angles):
        return f"{op.out.name} = cos, sin of each position times {len(op.frequencies)} frequencies"
    if isinstance(op, RopeAppend):
        return (
            f"rope({op.q.name}), rope({op.k.name}) -> key cache, {op.v.name} -> value cache   {op.head_dim} to a head"
        )
    if isinstance(op, Attention):
        return f"{op.out.name} = attention({op.q.name}, caches)"
    made = f"{op.out.name} {'+=' if op.adds else '='} {_source(op)} @ {op.weight.name.rpartition('.')[2]}.T"
    return f"{made:<52}{_matrix(op.weight)}{'  wanted rows, or the best token of each' if op.logits else ''}"


def _source(op: Matmul) -> str:
    if isinstance(op.source, Normed):
        norm = "layer_norm" if op.source.bias else "rms_norm"
        return "(the same)" if op.same_input else f"{norm}({op.source.x.name})"
    if isinstance(op.source, Gated):
        return f"{op.source.activation}({op.source.x.name} left) * right"
    return op.source.name


def _matrix(weight: Tensor) -> str:
    rows, cols = weight.shape
    return f"{rows:>7} x {cols:<6}{weight.format:<4}{weight.data.nbytes / 1e6:>8.2f} MB"
