"""A model's step as a list: the ops that `forward` asks for, recorded once, with the buffers they read and write.

`forward` runs over `Recorder` as it runs over arrays; what it passes from op to op are names of buffers and of things
that an op fuses: a norm or an activation becomes the prologue of the matmuls that read it, a sum the epilogue of the
op before it. What has no fused form gets an `Apply` of its own. Knows no kernel and no memory: a backend turns the list
into what it executes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgellm.adapter import LowRank
from edgellm.architectures import Architecture, LayerCache
from edgellm.arrays import F32
from edgellm.errors import BackendError
from edgellm.ops import Activation, Ops
from edgellm.quant import f32
from edgellm.tensor import Tensor, Weights


@dataclass(eq=False)
class Buffer:
    """A float32 array of the step, (rows, cols). A handle is good until an op changes the array in place."""

    name: str
    cols: int
    fresh: bool = True
    times: int = 1
    """Rows for each row of the step: one for each expert that it uses."""


@dataclass(frozen=True, eq=False)
class Normed:
    x: Buffer
    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centred: bool = False
    """A layer norm; without it, a root mean square norm."""

    @property
    def per_head(self) -> bool:
        return self.weight.shape[0] != self.x.cols


@dataclass(frozen=True, eq=False)
class Activated:
    x: Buffer
    activation: Activation
    gates: bool = False
    """The activated half of the columns multiplies the other."""


@dataclass(frozen=True, eq=False)
class Turned:
    x: Buffer
    head_dim: int
    frequencies: F32 | None
    """None for heads that know no position."""
    scale: float = 1.0
    norm: Normed | None = None
    """Of each head before it is turned."""
    turned_norm: Normed | None = None
    """Of each head after it, if not before."""


Value = Buffer | Normed | Activated | Turned
Source = Buffer | Normed | Activated


def buffer_of(source: Source) -> Buffer:
    """The array that is read, whatever becomes of its rows first."""
    return source if isinstance(source, Buffer) else source.x


@dataclass(eq=False)
class Embed:
    table: Tensor
    out: Buffer
    scale: float = 1.0
    by_position: bool = False
    """Rows for positions, added to what `out` holds, not for tokens."""


@dataclass(eq=False)
class Angles:
    """Cosines and sines of every row's RoPE angles times scale, for all layers with the same frequencies."""

    frequencies: F32
    scale: float
    out: Buffer


@dataclass(frozen=True, eq=False)
class Low:
    """Of a low-rank adapter, the second of two matmuls: the columns of `x` from `first` on, times b.T."""

    x: Buffer
    first: int
    b: F32
    """[rows / 16][rank][16]."""


@dataclass(eq=False)
class Matmul:
    weight: Tensor
    source: Source
    out: Buffer
    bias: Tensor | None = None
    adds: float = 0.0
    """Times this it is added to what `out` holds; 0: stored."""
    logits: bool = False
    """For the wanted rows only; a step may ask for the best token of each instead of its outputs."""
    scale: float = 1.0
    softcap: float = 0.0
    same_input: bool = False
    """The matmul before it has prepared the same rows."""
    low: Low | None = None
    """What an adapter adds to its outputs."""


@dataclass(eq=False)
class Apply:
    """A norm, an activation or a sum that no matmul does on the side."""

    source: Source
    out: Buffer
    adds: float = 0.0


@dataclass(eq=False)
class RopeAppend:
    q: Turned
    k: Turned
    v: Buffer
    angles: Angles | None
    layer: int


@dataclass(eq=False)
class Attention:
    q: Buffer
    out: Buffer
    layer: int
    scale: float
    softcap: float


@dataclass(eq=False)
class ShortConv:
    source: Buffer
    weight: Tensor
    out: Buffer
    layer: int


@dataclass(eq=False)
class Route:
    """The experts of every row, and their shares: from the router's outputs."""

    source: Buffer
    n_used: int
    normalize: bool


@dataclass(eq=False)
class ExpertMatmul:
    """Each row times the matrices of its experts: -> (rows * n_used, rows of one), grouped by expert."""

    weights: Sequence[Tensor]
    source: Source
    out: Buffer
    route: Route


@dataclass(eq=False)
class Combine:
    """The sum of what a row's experts made, times their shares."""

    source: Buffer
    out: Buffer
    route: Route
    adds: float = 0.0


Op = Embed | Angles | Matmul | Apply | RopeAppend | Attention | ShortConv | Route | ExpertMatmul | Combine


@dataclass(eq=False)
class Plan:
    ops: list[Op] = field(default_factory=list)
    caches: list[LayerCache] = field(default_factory=list)

    def buffers(self) -> Iterable[Buffer]:
        """Every array of the plan, in the order in which it is first written."""
        return dict.fromkeys(op.out for op in self.ops if not isinstance(op, (RopeAppend, Route)))

    def matrices(self) -> list[Tensor]:
        """Every matrix that rows are multiplied with, in order; all of an op's experts."""
        of_ops = (op.weights if isinstance(op, ExpertMatmul) else [op.weight] for op in self.matmuls())
        return [weight for weights in of_ops for weight in weights]

    def matmuls(self) -> list[Matmul | ExpertMatmul]:
        return [op for op in self.ops if isinstance(op, (Matmul, ExpertMatmul))]

    def bytes_read(self) -> int:
        """Bytes of the matrices that a step of one row reads: of experts, those that it uses."""
        matmuls = [op for op in self.ops if isinstance(op, Matmul)]
        experts = [op for op in self.ops if isinstance(op, ExpertMatmul)]
        return sum(op.weight.data.nbytes + (op.low.b.nbytes if op.low else 0) for op in matmuls) + sum(
            op.route.n_used * op.weights[0].data.nbytes for op in experts
        )


def record(architecture: Architecture, config: Any, tensors: dict[str, Tensor]) -> Plan:
    """The plan of a model."""
    recorder = Recorder(Plan(caches=architecture.caches(config)))
    ops: Ops[Value] = recorder
    architecture.forward(config, Weights(tensors), ops)
    return recorder.plan


def adapted(plan: Plan, pairs: Mapping[str, LowRank]) -> Plan:
    """The plan of a model whose matrices have something added, by their names: the first matmuls of those that read the
    same rows are one, before them; the second ones are done on the side, where outputs are stored."""
    result = Plan(caches=plan.caches)
    for alike in _with_same_input(plan.ops):
        low = {op: pairs[op.weight.name] for op in alike if isinstance(op, Matmul) and op.weight.name in pairs}
        if not low:
            result.ops += alike
            continue
        a, head = np.concatenate([pair.a for pair in low.values()]), next(iter(low))
        x = Buffer(f"low {len(a)}", len(a))
        result.ops.append(Matmul(_plain_tensor(f"{head.weight.name} a", a), head.source, x))
        firsts = np.cumsum([0, *(len(pair.a) for pair in low.values())]).tolist()
        lows = {op: Low(x, first, _by_16(pair.b)) for (op, pair), first in zip(low.items(), firsts, strict=False)}
        result.ops += [replace(op, low=lows[op]) if op in lows else op for op in alike]
    return result


def _with_same_input(ops: Sequence[Op]) -> Iterator[list[Op]]:
    """The ops one by one, but matmuls that share what was prepared together."""
    group: list[Op] = []
    for op in ops:
        if group and not (isinstance(op, Matmul) and op.same_input):
            yield group
            group = []
        group.append(op)
    yield group


def _by_16(b: F32) -> F32:
    rows, rank = b.shape
    padded = np.zeros((-(-rows // 16) * 16, rank), np.float32)
    padded[:rows] = b
    return np.ascontiguousarray(padded.reshape(-1, 16, rank).swapaxes(1, 2))


def _plain_tensor(name: str, values: F32) -> Tensor:
    return Tensor(name, values.shape, "f32", f32.pack(f32.quantize(values)))


class Recorder:
    """Ops that write a plan.

    Raises BackendError for a value that is used after an op has changed it, and for queries and keys that RoPE turns by
    different angles.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._arrays: dict[str, Buffer] = {}

    def embed(self, table: Tensor, scale: float = 1.0) -> Buffer:
        return self._append(Embed(table, self._buffer("x", table.shape[1]), scale))

    def add_positions(self, x: Value, table: Tensor) -> Buffer:
        return self._append(Embed(table, self._changed(self._plain(x)), by_position=True))

    def linear(self, x: Value, weight: Tensor, bias: Tensor | None = None) -> Buffer:
        last, source = self.plan.ops[-1], self._source(x)
        out = self._buffer(last_name(weight), weight.shape[0])
        same = isinstance(last, Matmul) and last.source is source and last.weight.format[0] == weight.format[0]
        return self._append(Matmul(weight, source, out, bias, same_input=same))

    def add(self, x: Value, y: Value, scale: float = 1.0) -> Buffer:
        """What has just made y adds to x in place."""
        target, made = self._plain(x), self.plan.ops[-1]
        if isinstance(made, (Matmul, Apply, Combine)) and made.out is y and not made.adds and not _reads(made, target):
            made.out, made.adds = self._changed(target), scale
            return made.out
        source = self._source(y)
        return self._append(Apply(source, self._changed(target), scale))

    def rms_norm(self, x: Value, weight: Tensor, eps: float) -> Normed | Turned:
        if isinstance(x, Turned) and not (x.norm or x.turned_norm) and weight.shape[0] == x.head_dim:
            return replace(x, turned_norm=Normed(x.x, weight, eps))
        return Normed(self._plain(x), weight, eps)

    def layer_norm(self, x: Value, weight: Tensor, bias: Tensor | None, eps: float) -> Normed:
        return Normed(self._plain(x), weight, eps, bias, centred=True)

    def activate(self, x: Value, activation: Activation) -> Activated:
        return Activated(self._plain(x), activation)

    def glu(self, x: Value, activation: Activation) -> Activated:
        return Activated(self._plain(x), activation, gates=True)

    def rope(self, x: Value, head_dim: int, frequencies: F32, scale: float = 1.0) -> Turned:
        return self._heads(x, head_dim, frequencies, scale)

    def attention(self, q: Value, k: Value, v: Value, layer: int, scale: float, softcap: float = 0.0) -> Buffer:
        head_dim = self.plan.caches[layer].head_dim
        q, k = (x if isinstance(x, Turned) else self._heads(x, head_dim, None) for x in (q, k))
        if _turn(q) != _turn(k):
            raise BackendError(
                f"{q.x.name!r} and {k.x.name!r} are turned by different angles; this backend turns queries and keys "
                "alike: use --backend reference"
            )
        self.plan.ops.append(RopeAppend(q, k, self._plain(v), self._angles(q), layer))
        return self._append(Attention(q.x, self._buffer("attention", q.x.cols), layer, scale, softcap))

    def short_conv(self, x: Value, weight: Tensor, layer: int) -> Buffer:
        return self._append(ShortConv(self._plain(x), weight, self._buffer("conv", weight.shape[0]), layer))

    def experts(
        self,
        x: Value,
        router: Tensor,
        gate_up: Sequence[Tensor],
        down: Sequence[Tensor],
        n_used: int,
        activation: Activation,
        normalize: bool,
    ) -> Buffer:
        source = self._source(x)
        route = Route(self.linear(source, router), n_used, normalize)
        self.plan.ops.append(route)
        h = self._expert_matmul(gate_up, source, route)
        y = self._expert_matmul(down, Activated(h, activation, gates=True), route)
        return self._append(Combine(y, self._buffer("experts", down[0].shape[0]), route))

    def logits(self, x: Value, table: Tensor, scale: float = 1.0, softcap: float = 0.0) -> Buffer:
        out = self._buffer("logits", table.shape[0])
        return self._append(Matmul(table, self._source(x), out, logits=True, scale=scale, softcap=softcap))

    def _expert_matmul(self, weights: Sequence[Tensor], source: Source, route: Route) -> Buffer:
        out = self._buffer(f"expert {last_name(weights[0])}", weights[0].shape[0], times=route.n_used)
        return self._append(ExpertMatmul(weights, source, out, route))

    def _heads(self, x: Value, head_dim: int, frequencies: F32 | None, scale: float = 1.0) -> Turned:
        if isinstance(x, Normed) and x.weight.shape[0] == head_dim and not x.centred:
            return Turned(_fresh(x.x), head_dim, frequencies, scale, norm=x)
        return Turned(self._plain(x), head_dim, frequencies, scale)

    def _angles(self, turned: Turned) -> Angles | None:
        if turned.frequencies is None:
            return None
        for op in self.plan.ops:
            if isinstance(op, Angles) and op.frequencies is turned.frequencies and op.scale == turned.scale:
                return op
        out = self._buffer(self._unused("angles"), 2 * len(turned.frequencies))
        angles = Angles(turned.frequencies, turned.scale, out)
        self.plan.ops.insert(1, angles)
        return angles

    def _unused(self, name: str) -> str:
        return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 999))) if n not in self._arrays)

    def _source(self, x: Value) -> Source:
        """What a matmul can read: heads that are normed or turned are not."""
        if isinstance(x, Turned):
            raise BackendError("this backend has no use of what RoPE has turned but attention: use --backend reference")
        if isinstance(x, Normed) and x.per_head:
            return self._plain(x)
        _fresh(buffer_of(x))
        return x

    def _plain(self, x: Value) -> Buffer:
        """A buffer of the value, by an op of its own if need be."""
        if isinstance(x, Buffer):
            return _fresh(x)
        if isinstance(x, Turned):
            return self._plain(self._source(x))
        _fresh(x.x)
        cols = x.x.cols // 2 if isinstance(x, Activated) and x.gates else x.x.cols
        return self._append(Apply(x, self._buffer(f"{kind_of(x)} {x.x.name}", cols)))

    def _changed(self, x: Buffer) -> Buffer:
        """A new handle of an array that an op changes in place."""
        x.fresh = False
        self._arrays[x.name] = Buffer(x.name, x.cols, times=x.times)
        return self._arrays[x.name]

    def _append(self, op: Any) -> Buffer:
        self.plan.ops.append(op)
        out: Buffer = op.out
        return out

    def _buffer(self, name: str, cols: int, times: int = 1) -> Buffer:
        """A new handle of the array of that name, which earlier layers have used too."""
        if name in self._arrays:
            self._arrays[name].fresh = False
        self._arrays[name] = Buffer(name, cols, times=times)
        return self._arrays[name]


def _fresh(x: Buffer) -> Buffer:
    if not x.fresh:
        raise BackendError(f"{x.name!r} is used after an op has changed it: use --backend reference")
    return x


def _turn(heads: Turned) -> tuple[float, list[float] | None]:
    """What says by which angles they are turned."""
    return heads.scale, None if heads.frequencies is None else heads.frequencies.tolist()


def _reads(op: Matmul | Apply | Combine, x: Buffer) -> bool:
    """Whether the op could not write there, because it may not have read all yet."""
    return x in (op.out, buffer_of(op.source))


def last_name(weight: Tensor) -> str:
    return weight.name.rpartition(".")[2]


def kind_of(x: Normed | Activated) -> str:
    return ("layer_norm" if x.centred else "rms_norm") if isinstance(x, Normed) else x.activation
