"""The CPU backend: a recorded plan, compiled kernels, and a team of threads that runs it step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from edgellm import isa, quant
from edgellm.adapter import Adapter
from edgellm.architectures import Architecture
from edgellm.arrays import F32, I32, Array, address
from edgellm.backends._cpu_cache import Layer, Slot, block, slot_bytes
from edgellm.cache import Slots
from edgellm.footprint import Footprint
from edgellm.kernels import Body, Compiler, Kernel, compiler, dots, layout
from edgellm.kernels.attention import TASK_QUERIES, attention, attention_merge, n_partial_floats
from edgellm.kernels.best import best
from edgellm.kernels.experts import combine, expert_matmul, expert_prepare, route
from edgellm.kernels.matmul import matmul
from edgellm.kernels.prepare import prepare
from edgellm.kernels.rows import FORMATS, apply, embed, rope_angles, rope_append, short_conv
from edgellm.kernels.run import run, serve
from edgellm.kernels.share import N_CLAIMS
from edgellm.kernels.team import Team
from edgellm.plan import (
    Activated,
    Angles,
    Apply,
    Attention,
    Buffer,
    Combine,
    Embed,
    ExpertMatmul,
    Low,
    Matmul,
    Normed,
    Op,
    Plan,
    RopeAppend,
    Route,
    ShortConv,
    Source,
    Turned,
    adapted,
    buffer_of,
    record,
)
from edgellm.step import Step
from edgellm.tensor import Tensor

ACTIVATIONS = {"silu": layout.SILU, "gelu": layout.GELU, "gelu_tanh": layout.GELU_TANH, "relu2": layout.RELU2}
QUANTIZED = ("q2t", "q4", "q4m", "q8")
OF_STEP = [cell // layout.CELL for cell in (
    layout.STEP_ROWS, layout.STEP_N_WANTED, layout.STEP_CACHES, layout.STEP_LOGITS, layout.STEP_BEST,
)]  # fmt: skip
SCRATCH = [cell // layout.CELL for cell in (layout.STEP_SCRATCH, layout.STEP_SCRATCH_BYTES, layout.STEP_PACKED)]
BEST = np.dtype([("logit", np.float32), ("token", np.int32)])
"""What a thread finds for a row; see kernels.best."""
NOTHING = np.array((-np.inf, 0), BEST)
WORTH_MORE_KERNELS = 16
"""Rows of a first step that are worth compiling the dot kernels for several rows; until then it is done row by row."""


ALWAYS = run, serve, embed, prepare, matmul, best
OPS: dict[type[Op], tuple[Body, ...]] = {
    Angles: (rope_angles,),
    RopeAppend: (rope_append,),
    Attention: (attention, attention_merge),
    Apply: (apply,),
    ShortConv: (short_conv,),
    Route: (route,),
    ExpertMatmul: (expert_prepare, expert_matmul),
    Combine: (combine,),
}
"""What is compiled for ops besides ALWAYS."""


OF_CACHES = rope_append, attention
"""Of these, what depends on the kind of the cache."""


def needed(
    formats: Iterable[str], most_rows: int, ops: Iterable[type[Op]] = tuple(OPS), kv: str = "f16"
) -> list[Kernel]:
    """The kernels of any model of these ops with matrices in these formats, for up to `most_rows` rows at once."""
    wanted = set(ops)
    bodies: list[Body] = [*ALWAYS, *(body for op, of_op in OPS.items() if op in wanted for body in of_op)]
    rows = sorted({1, min(4, most_rows), most_rows})
    products = [Kernel(getattr(dots, fmt), n) for fmt in sorted(set(formats)) for n in rows]
    return [*(Kernel(body, cache=kv if body in OF_CACHES else "f16") for body in bodies), *products]


class Backend(Slots[Slot]):
    MAX_ROWS = 128  # so that what ops leave for each other stays in the caches

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        tensors: dict[str, Tensor],
        context_length: int,
        n_threads: int | None = None,
        kv: str = "f16",
    ) -> None:
        self.CACHE_LAYOUT, self._kv = ("float16 1" if kv == "f16" else f"{kv} 1"), kv
        self._vocab_size = config.vocab_size
        self._kernels, plan = compiler(isa.detect()), record(architecture, config, tensors)
        self._plan = plan  # whose arrays the records point into
        most_rows = self._kernels.isa.ROWS if self._kernels.load(_needed(plan, self._kernels.isa.ROWS, kv)) else 1
        self._kernels.get(_needed(plan, most_rows, kv))
        self._team = Team(self._kernels, n_threads)
        self._memory = _Memory(plan, context_length, self.MAX_ROWS, self._team.n_threads, kv)
        self._adapted: WeakKeyDictionary[Adapter, _Program] = WeakKeyDictionary()
        self._lower(most_rows)
        # A step's numbers always stand in the same memory: after each step Python is slow, as weights have taken the
        # place of all that it needs in the caches, so there is little for it to do.
        self._rows = np.zeros((4, self.MAX_ROWS), np.int32)
        self._caches = np.zeros(1, np.int64)
        self._found = np.zeros(self._team.n_threads * self.MAX_ROWS, BEST)
        self._found_address = address(self._found)
        tokens, positions, slots, wanted = (address(row) for row in self._rows)
        self._step = _cells(layout.STEP_CELLS, "STEP_", {
            "TOKENS": tokens, "POSITIONS": positions, "SLOTS": slots, "WANTED": wanted,
        })  # fmt: skip
        self._place_scratch()
        super().__init__(context_length)
        self._weight_bytes = sum(tensor.data.nbytes for tensor in tensors.values())

    @property
    def footprint(self) -> Footprint:
        return Footprint(
            weights=self._weight_bytes,
            cache=slot_bytes(self._memory.layers),
            arena=self._memory.n_bytes + self._scratch.nbytes,
            adapters=sum(self._bytes_of_adapter(*each) for each in self._adapted.items()),
        )

    def _bytes_of_adapter(self, adapter: Adapter, program: _Program) -> int:
        """Its values, and the same in the order in which kernels read them."""
        return adapter.n_bytes + program.plan.bytes_read() - self._plan.bytes_read()

    def _lower(self, most_rows: int) -> None:
        self._program = self._program_of(self._plan, most_rows)
        for adapter, program in self._adapted.items():
            self._adapted[adapter] = self._program_of(program.plan, most_rows)
        self._most_rows = most_rows

    def _program_of(self, plan: Plan, most_rows: int) -> _Program:
        self._kernels.get(_needed(plan, most_rows, self._kv))
        return _Program(plan, _Lowering(self._kernels, plan, self._memory, most_rows).records())

    def adapt(self, adapter: Adapter) -> None:
        if adapter not in self._adapted:
            plan = adapted(self._plan, adapter.pairs)
            self._team.finish()
            self._memory.cover(plan)
            self._place_scratch()
            self._adapted[adapter] = self._program_of(plan, self._most_rows)

    def _place_scratch(self) -> None:
        self._scratch = block(self._team.n_threads * self._memory.scratch_bytes)
        self._step[SCRATCH] = address(self._scratch), self._memory.scratch_bytes, address(self._memory.packed)

    def bytes_of(self, n_tokens: int) -> int:
        return sum(layer.bytes_of(n_tokens) for layer in self._memory.layers)

    def _new_slot(self) -> Slot:
        return Slot(self._memory.layers)

    def _recorded(self) -> Plan:
        return self._plan

    def _rings(self) -> list[tuple[int, int]]:
        return [layer.ring for layer in self._memory.layers]

    def drop(self, slot: int, first: int, count: int) -> None:
        self._team.finish()
        super().drop(slot, first, count)

    def open_slot(self) -> int:
        slot = super().open_slot()
        self._place_caches()
        return slot

    def close_slot(self, slot: int) -> None:
        self._team.finish()
        super().close_slot(slot)
        self._place_caches()

    def _place_caches(self) -> None:
        self._team.finish()
        self._caches = np.zeros(max(self._slots, default=0) + 1, np.int64)
        for slot, held in self._slots.items():
            self._caches[slot] = held.address
        self._caches_address = address(self._caches)

    def run(self, step: Step) -> F32:
        logits = np.empty((len(step.wanted), -(-self._vocab_size // 16) * 16), np.float32)
        self._run(step, logits=address(logits), out=logits)
        return logits[:, : self._vocab_size]

    def best(self, step: Step) -> I32:
        found = self._found[: self._team.n_threads * len(step.wanted)]
        self._team.finish()
        found[:] = NOTHING
        self._run(step, best=self._found_address)
        of_threads = found.tolist()
        n = len(step.wanted)
        return np.array([_best_of(of_threads[row::n]) for row in range(n)], np.int32)

    def hidden(self, step: Step) -> F32:
        none_wanted = Step(step.tokens, step.slots, step.positions, step.wanted[:0])
        self._run(none_wanted, best=self._found_address)
        last = self._plan.ops[-1]
        assert isinstance(last, Matmul)
        source = last.source
        return _normed(source, self._memory.rows(buffer_of(source), len(step.tokens)))

    def _run(self, step: Step, logits: int = 0, best: int = 0, out: Array | None = None) -> None:
        if self._most_rows == 1 and len(step.tokens) >= WORTH_MORE_KERNELS:
            self._lower(self._kernels.isa.ROWS)
        if step.adapter:
            self.adapt(step.adapter)
        self._begin(step)
        self._team.finish()
        self._running = self._adapted[step.adapter] if step.adapter else self._program
        n_rows, n_wanted, rows = len(step.tokens), len(step.wanted), self._rows
        rows[0, :n_rows], rows[1, :n_rows], rows[2, :n_rows] = step.tokens, step.positions, step.slots
        rows[3, :n_wanted] = step.wanted
        self._step[OF_STEP] = n_rows, n_wanted, self._caches_address, logits, best
        self._team.run(self._running.records, self._step, out)
        self._end(step)

    def close(self) -> None:
        self._team.close()
        self._adapted.clear()
        self._slots, self._plan = {}, Plan()
        self._program = self._running = _Program(self._plan, self._program.records[:0])


@dataclass(frozen=True, eq=False)
class _Program:
    plan: Plan
    """Whose arrays the records point into."""
    records: Array


def _needed(plan: Plan, most_rows: int, kv: str) -> list[Kernel]:
    return needed((weight.format for weight in plan.matrices()), most_rows, {type(op) for op in plan.ops}, kv)


def _best_of(pairs: list[tuple[float, int]]) -> int:
    """The token of the largest logit of all threads, the first of equals; -1 if one is not a number."""
    return -1 if any(token < 0 for _, token in pairs) else -max((logit, -token) for logit, token in pairs)[1]


def _cells(count: int, prefix: str, fields: dict[str, Any]) -> Array:
    """A record or a step: numbers in the cells that layout names."""
    cells = np.zeros(count, np.int64)
    for name, value in fields.items():
        at = getattr(layout, prefix + name) // layout.CELL
        if isinstance(value, float):
            cells[at : at + 1].view(np.float32)[0] = value
        else:
            cells[at] = value
    return cells


class _Memory:
    """The arrays of a plan, for at most max_rows rows."""

    def __init__(self, plan: Plan, context_length: int, max_rows: int, n_threads: int, kv: str) -> None:
        self.kv = kv
        self._arrays: dict[str, tuple[Array, int]] = {}
        self._addresses: dict[ExpertMatmul, Array] = {}
        self._max_rows, self.scratch_bytes, self.packed = max_rows, 0, block(0)
        self.cover(plan)
        self.layers: list[Layer] = []
        for cache in plan.caches:
            start = self.layers[-1].end if self.layers else 0
            self.layers.append(Layer(cache, context_length, max_rows, start, kv))
        attended = [(op.q.cols, self.layers[op.layer]) for op in plan.ops if isinstance(op, Attention)]
        sizes = [
            n_partial_floats(max_rows, cols // layer.cache.head_dim, layer.cache.head_dim, layer.capacity, n_threads)
            for cols, layer in attended
        ]
        self.partials = block(4 * max(sizes, default=0))
        self.routes = {
            op: block(4 * (op.source.cols + 1 + 3 * max_rows * op.n_used)) for op in plan.ops if isinstance(op, Route)
        }

    def cover(self, plan: Plan) -> None:
        """Have room for what another plan computes besides, of the same model with an adapter."""
        for buffer in plan.buffers():
            stride = 64 * -(-buffer.cols // 16)
            if buffer.name not in self._arrays and buffer.name != "logits":
                self._arrays[buffer.name] = block(self._max_rows * buffer.times * stride + 4096), stride
        matmuls = plan.matmuls()
        packed = max(self._max_rows * op.out.times * packed_bytes(_one(op)) for op in matmuls)
        self.packed = self.packed if packed <= self.packed.nbytes else block(packed)
        columns = max(-(-cols // 64) * 64 for cols in (
            *(_one(op).shape[1] for op in matmuls), *(op.out.cols for op in plan.ops if isinstance(op, Apply)),
        ))  # fmt: skip
        scratch = max(4096 + 4 * columns, *(packed_bytes(_one(op)) for op in matmuls))
        self.scratch_bytes = max(self.scratch_bytes, 2 * (-(-scratch // 4096) * 4096))

    @property
    def n_bytes(self) -> int:
        arrays = *(array for array, _ in self._arrays.values()), self.packed, self.partials, *self.routes.values()
        return sum(array.nbytes for array in arrays)

    def addresses(self, op: ExpertMatmul) -> Array:
        """Of the experts' matrices, int64."""
        if op not in self._addresses:
            self._addresses[op] = np.array([weight.data.ctypes.data for weight in op.weights], np.int64)
        return self._addresses[op]

    def rows(self, buffer: Buffer, n: int) -> F32:
        """A copy of the first rows: (n, cols)."""
        array, stride = self._arrays[buffer.name]
        found: F32 = array[: n * stride].view(np.float32).reshape(n, -1)[:, : buffer.cols].copy()
        return found

    def place(self, buffer: Buffer) -> tuple[int, int]:
        """Address and bytes between rows."""
        array, stride = self._arrays[buffer.name]
        return address(array), stride


def _normed(source: Source, x: F32) -> F32:
    """What a matmul reads of some rows, if it is not activated."""
    assert not isinstance(source, Activated)
    if isinstance(source, Buffer):
        return x
    if source.centred:
        x = x - x.mean(axis=1, keepdims=True)
    weight, bias = source.weight.data[: x.shape[1]], source.bias
    y: F32 = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(source.eps)) * weight
    return y if bias is None else y + bias.data[: x.shape[1]]


def _one(op: Matmul | ExpertMatmul) -> Tensor:
    """The matrix, or one of those, which are alike."""
    return op.weight if isinstance(op, Matmul) else op.weights[0]


def packed_bytes(weight: Tensor) -> int:
    """Bytes of one row of activations, prepared for a matrix."""
    tiles = quant.tile_grid(*weight.shape)[1]
    return tiles * (64 * code_bytes(weight) + 56)


def code_bytes(weight: Tensor) -> int:
    return 1 if weight.format in QUANTIZED else 4


class _Lowering:
    """A plan's ops -> records: addresses, sizes, and the kernels that they ask for."""

    def __init__(self, kernels: Compiler, plan: Plan, memory: _Memory, most_rows: int) -> None:
        self._kernels, self._plan, self._memory, self._most_rows = kernels, plan, memory, most_rows

    def records(self) -> Array:
        """(ops, RECORD_CELLS) int64."""
        rows = list(self._rows())
        self._chain(rows)
        return np.stack([_cells(layout.RECORD_CELLS, "", fields) for fields in rows])

    def _chain(self, rows: list[dict[str, Any]]) -> None:
        """Tell each op which matrix is read next; after the last one comes the next step's first."""
        of_matmuls = {self._kernels.op(matmul), self._kernels.op(best)}
        for i, row in enumerate(row for row in rows if row["OP"] in of_matmuls):
            row["CLAIM"] = i % N_CLAIMS
        matrix = next(row for row in rows if row["OP"] in of_matmuls)
        for row in reversed(rows):
            row["NEXT_WEIGHT"], row["NEXT_BLOCKS"] = matrix["WEIGHT"], matrix["N_BLOCKS"]
            row["NEXT_BLOCK_BYTES"] = matrix["N_TILES"] * matrix["TILE_BYTES"]
            matrix = row if row["OP"] in of_matmuls else matrix

    def _rows(self) -> Iterator[dict[str, Any]]:
        following = [*self._plan.ops[1:], None]
        for op, after in zip(self._plan.ops, following, strict=True):
            match op:
                case Matmul():
                    yield from self._matmul(op, joined=isinstance(after, Matmul) and after.same_input)
                case Embed():
                    yield self._embed(op)
                case Angles():
                    yield self._angles(op)
                case Apply():
                    yield self._apply(op)
                case RopeAppend():
                    yield self._rope_append(op)
                case Attention():
                    yield from self._attention(op)
                case ShortConv():
                    yield self._short_conv(op)
                case Route():
                    yield {**self._route(op), **self._read(op.source), "OP": self._kernels.op(route), "BARRIER": 1}
                case ExpertMatmul():
                    yield from self._expert_matmul(op)
                case Combine():
                    yield self._combine(op)

    def _read(self, source: Source) -> dict[str, Any]:
        """Where rows come from, and what becomes of them first."""
        at, stride = self._memory.place(buffer_of(source))
        fields: dict[str, Any] = {"SOURCE": at, "SOURCE_STRIDE": stride}
        if isinstance(source, Normed):
            fields["PROLOGUE"] = layout.LAYER_NORM if source.centred else layout.RMS_NORM
            fields |= {"NORM": _vector(source.weight), "NORM_EPS": float(source.eps)}
            fields["NORM_BIAS"] = _vector(source.bias)
        elif isinstance(source, Activated):
            fields["PROLOGUE"] = layout.GATED if source.gates else layout.ACTIVATED
            fields["ACTIVATION"] = ACTIVATIONS[source.activation]
        return fields

    def _write(self, out: Buffer, adds: float = 0.0) -> dict[str, Any]:
        at, stride = self._memory.place(out)
        return {"TARGET": at, "TARGET_STRIDE": stride, "ADDS": float(adds)}

    def _embed(self, op: Embed) -> dict[str, Any]:
        return {
            **_matrix(op.table), **self._write(op.out, adds=op.by_position), "OP": self._kernels.op(embed),
            "BARRIER": 1, "SCALE": float(op.scale), "COLS": op.table.shape[1],
            "TABLE_FORMAT": FORMATS.index(op.table.format),
        }  # fmt: skip

    def _angles(self, op: Angles) -> dict[str, Any]:
        return {
            **self._write(op.out), "OP": self._kernels.op(rope_angles), "BARRIER": 1, "SCALE": float(op.scale),
            "N_ANGLES": len(op.frequencies), "ANGLES": op.frequencies.ctypes.data,
        }  # fmt: skip

    def _apply(self, op: Apply) -> dict[str, Any]:
        parts = op.source.x.cols // op.source.weight.shape[0] if isinstance(op.source, Normed) else 1
        cols = op.out.cols // parts
        return {
            **self._read(op.source), **self._write(op.out, op.adds), "OP": self._kernels.op(apply), "BARRIER": 1,
            "COLS": cols, "N_TILES": -(-cols // 64), "N_HEADS": parts,
        }  # fmt: skip

    def _matmul(self, op: Matmul, joined: bool) -> Iterator[dict[str, Any]]:
        fields = {
            **self._product(op.weight, op.source), "GATHERS": op.logits, "SAME_INPUT": op.same_input,
            "BIAS": _vector(op.bias),
        }  # fmt: skip
        if op.logits:
            fields |= {"TARGET_STRIDE": 64 * fields["N_BLOCKS"], "VOCAB_SIZE": op.weight.shape[0]}
            fields["LOGITS_OP"] = self._kernels.op(matmul)
            if op.scale != 1 or op.softcap:
                fields |= {"SCALE": float(op.scale), "SOFTCAP": float(op.softcap)}
        else:
            fields |= self._write(op.out, op.adds)
        if op.low:
            fields |= self._low(op.low)
        if not op.same_input:
            yield {**fields, "OP": self._kernels.op(prepare), "BARRIER": 2}
        yield {**fields, "OP": self._kernels.op(best if op.logits else matmul), "BARRIER": 0 if joined else 1}

    def _low(self, low: Low) -> dict[str, Any]:
        at, stride = self._memory.place(low.x)
        return {"LOW_RANK": low.b.shape[1], "LOW": at + 4 * low.first, "LOW_STRIDE": stride, "LOW_B": address(low.b)}

    def _product(self, weight: Tensor, source: Source) -> dict[str, Any]:
        """What matmuls have in common."""
        body = getattr(dots, weight.format)
        kernels = {
            f"DOT_{name}": self._kernels.dot(body, n)
            for name, n in (("1", 1), ("4", 4), ("N", self._most_rows))
            if n <= self._most_rows
        }
        return {
            **_matrix(weight), **self._read(source), **kernels, "COLS": weight.shape[1], "PAIR": weight.pair,
            "CODE_BYTES": code_bytes(weight), "ROWS_N": self._most_rows,
        }  # fmt: skip

    def _rope_append(self, op: RopeAppend) -> dict[str, Any]:
        (q, q_stride), (k, k_stride) = self._memory.place(op.q.x), self._memory.place(op.k.x)
        fields = {
            **self._heads(op.q.x, self._memory.layers[op.layer]),
            "OP": self._kernels.op(rope_append, self._memory.kv),
            "QUERIES": q, "SOURCE_STRIDE": q_stride, "KEYS": k, "TARGET_STRIDE": k_stride,
            "VALUES": self._memory.place(op.v)[0], **_head_norm(op.q, "Q", "NORM_EPS"),
            **_head_norm(op.k, "K", "K_NORM_EPS"),
        }  # fmt: skip
        fields["BARRIER"] = 4 if fields["N_HEADS"] // fields["N_KV_HEADS"] <= TASK_QUERIES else 1
        if op.angles:
            fields["ANGLES"], fields["ANGLES_STRIDE"] = self._memory.place(op.angles.out)
            fields["N_ANGLES"] = len(op.angles.frequencies)
        return fields

    def _heads(self, q: Buffer, layer: Layer) -> dict[str, Any]:
        return {
            "HEAD_DIM": layer.cache.head_dim, "N_HEADS": q.cols // layer.cache.head_dim, "CAPACITY": layer.capacity,
            "N_KV_HEADS": layer.cache.n_kv_heads, "KV_OFFSET": layer.keys, "V_OFFSET": layer.values,
            "WINDOW": layer.window,
        }  # fmt: skip

    def _attention(self, op: Attention) -> Iterator[dict[str, Any]]:
        layer = self._memory.layers[op.layer]
        fields = {
            **self._heads(op.q, layer), "QUERIES": self._memory.place(op.q)[0], "OUT": self._memory.place(op.out)[0],
            "SOURCE_STRIDE": self._memory.place(op.q)[1], "TARGET_STRIDE": self._memory.place(op.out)[1],
            "PARTIALS": address(self._memory.partials), "SCALE": float(op.scale), "SOFTCAP": float(op.softcap),
        }  # fmt: skip
        yield {**fields, "OP": self._kernels.op(attention, self._memory.kv), "BARRIER": 1}
        yield {**fields, "OP": self._kernels.op(attention_merge), "BARRIER": 3}

    def _short_conv(self, op: ShortConv) -> dict[str, Any]:
        layer = self._memory.layers[op.layer]
        return {
            **self._read(op.source), **self._write(op.out), "OP": self._kernels.op(short_conv), "BARRIER": 1,
            "COLS": op.weight.shape[0], "N_TAPS": op.weight.shape[1], "NORM": op.weight.data.ctypes.data,
            "TILE_BYTES": quant.get(op.weight.format).TILE_BYTES, "CAPACITY": layer.capacity, "KV_OFFSET": layer.keys,
        }  # fmt: skip

    def _route(self, op: Route) -> dict[str, Any]:
        return {
            "ROUTES": address(self._memory.routes[op]), "N_EXPERTS": op.source.cols, "N_USED": op.n_used,
            "NORMALIZES": op.normalize,
        }  # fmt: skip

    def _expert_matmul(self, op: ExpertMatmul) -> Iterator[dict[str, Any]]:
        fields = {
            **self._product(op.weights[0], op.source), **self._write(op.out), **self._route(op.route), "BARRIER": 1,
            "WEIGHT": address(self._memory.addresses(op)), "SPREADS": buffer_of(op.source).times == 1,
        }  # fmt: skip
        yield {**fields, "OP": self._kernels.op(expert_prepare)}
        yield {**fields, "OP": self._kernels.op(expert_matmul)}

    def _combine(self, op: Combine) -> dict[str, Any]:
        return {
            **self._route(op.route), **self._read(op.source), **self._write(op.out, op.adds), "COLS": op.out.cols,
            "OP": self._kernels.op(combine), "BARRIER": 1,
        }  # fmt: skip


def _head_norm(heads: Turned, which: str, eps: str) -> dict[str, Any]:
    norm, when = (heads.turned_norm, "TURNED_") if heads.turned_norm else (heads.norm, "")
    return {f"{which}_{when}NORM": _vector(norm.weight), eps: float(norm.eps)} if norm else {}


def _vector(tensor: Tensor | None) -> int:
    return int(tensor.data.ctypes.data) if tensor else 0


def _matrix(weight: Tensor) -> dict[str, int]:
    blocks, tiles = quant.tile_grid(*weight.shape)
    return {
        "WEIGHT": weight.data.ctypes.data, "N_BLOCKS": blocks, "N_TILES": tiles,
        "TILE_BYTES": quant.get(weight.format).TILE_BYTES,
    }  # fmt: skip
