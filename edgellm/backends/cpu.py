"""The CPU backend: a recorded plan, compiled kernels, and a team of threads that runs it step by step."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgellm import isa, quant
from edgellm.architectures import Architecture, LayerCache
from edgellm.arrays import F32, I32, Array
from edgellm.cache import Held, Slots
from edgellm.kernels import Compiler, Kernel, compiler, dots, layout
from edgellm.kernels.attention import attention, attention_merge, n_partial_floats
from edgellm.kernels.best import best
from edgellm.kernels.matmul import matmul
from edgellm.kernels.prepare import prepare
from edgellm.kernels.rows import FORMATS, embed, rope_angles, rope_append
from edgellm.kernels.run import run, serve
from edgellm.kernels.team import Team
from edgellm.plan import Angles, Attention, Buffer, Embed, Gated, Matmul, Normed, Plan, RopeAppend, record
from edgellm.step import Step
from edgellm.tensor import Tensor

PROLOGUES = {"silu": 2, "gelu_tanh": 3}
QUANTIZED = ("q4", "q4m", "q8")
OF_STEP = [cell // layout.CELL for cell in (
    layout.STEP_ROWS, layout.STEP_N_WANTED, layout.STEP_TOKENS, layout.STEP_POSITIONS, layout.STEP_SLOTS,
    layout.STEP_CACHES, layout.STEP_WANTED,
)]  # fmt: skip
BEST = np.dtype([("logit", np.float32), ("token", np.int32)])
"""What a thread finds for a row; see kernels.best."""
WORTH_MORE_KERNELS = 16
"""Rows of a first step that are worth compiling the dot kernels for several rows; until then it is done row by row."""


def needed(formats: Iterable[str], most_rows: int) -> list[Kernel]:
    """The kernels of any model with matrices in these formats, for up to `most_rows` rows at once."""
    bodies = (run, serve, embed, rope_angles, rope_append, attention, attention_merge, prepare, matmul, best)
    rows = sorted({1, min(4, most_rows), most_rows})
    products = [Kernel(getattr(dots, fmt), n) for fmt in sorted(set(formats)) for n in rows]
    return [*(Kernel(body) for body in bodies), *products]


class Backend(Slots["_Slot"]):
    MAX_ROWS = 128  # so that what ops leave for each other stays in the caches

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        tensors: dict[str, Tensor],
        context_length: int,
        n_threads: int | None = None,
    ) -> None:
        self._vocab_size = config.vocab_size
        self._kernels, plan = compiler(isa.detect()), record(architecture, config, tensors)
        self._plan = plan  # whose arrays the records point into
        most_rows = self._kernels.isa.ROWS if self._kernels.load(self._needed(self._kernels.isa.ROWS)) else 1
        self._kernels.get(self._needed(most_rows))
        self._team = Team(self._kernels, n_threads)
        self._memory = _Memory(plan, context_length, self.MAX_ROWS, self._team.n_threads)
        self._lower(most_rows)
        self._scratch = _block(self._team.n_threads * self._memory.scratch_bytes)
        self._cells = _cells(layout.STEP_CELLS, "STEP_", {
            "SCRATCH": _address(self._scratch), "SCRATCH_BYTES": self._memory.scratch_bytes,
            "PACKED": _address(self._memory.packed),
        })  # fmt: skip
        super().__init__(context_length)

    def _needed(self, most_rows: int) -> list[Kernel]:
        return needed((op.weight.format for op in self._plan.ops if isinstance(op, Matmul)), most_rows)

    def _lower(self, most_rows: int) -> None:
        self._kernels.get(self._needed(most_rows))
        self._records = _Lowering(self._kernels, self._plan, self._memory, most_rows).records()
        self._most_rows = most_rows

    def _new_slot(self) -> _Slot:
        return _Slot(self._memory.layers)

    def run(self, step: Step) -> F32:
        logits = np.empty((len(step.wanted), -(-self._vocab_size // 16) * 16), np.float32)
        self._run(step, layout.STEP_LOGITS, logits)
        return logits[:, : self._vocab_size]

    def best(self, step: Step) -> I32:
        found = np.full((self._team.n_threads, len(step.wanted)), np.array((-np.inf, 0), BEST))
        self._run(step, layout.STEP_BEST, found)
        # Threads have their tokens in ascending order, so the first of equals is right here too; NaN counts as largest.
        best_thread = found["logit"].argmax(axis=0)
        tokens: I32 = found["token"][best_thread, np.arange(len(step.wanted))]
        return tokens

    def _run(self, step: Step, wants: int, out: Array) -> None:
        if self._most_rows == 1 and len(step.tokens) >= WORTH_MORE_KERNELS:
            self._lower(self._kernels.isa.ROWS)
        self._begin(step)
        caches = np.zeros(max(self._slots) + 1, np.int64)
        for slot, held in self._slots.items():
            caches[slot] = held.address
        wanted, cells = np.ascontiguousarray(step.wanted, np.int32), self._cells.copy()
        arrays = step.tokens, step.positions, step.slots, caches, wanted, out
        cells[OF_STEP] = len(step.tokens), len(wanted), *(_address(array) for array in arrays[:-1])
        cells[wants // layout.CELL] = _address(out)
        self._team.run(self._records, cells, *arrays)
        self._end(step)

    def close(self) -> None:
        self._team.close()
        self._slots, self._records, self._plan = {}, self._records[:0], Plan()


def _block(n_bytes: int) -> Array:
    """Zeroed memory that the system gives when it is touched, on a page boundary."""
    return np.frombuffer(mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE)), np.uint8)


def _address(block: Array) -> int:
    return int(block.ctypes.data)


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


class _Layer:
    """Where the keys and values of an attention layer stand in a slot's memory."""

    def __init__(self, cache: LayerCache, context_length: int, max_rows: int, offset: int) -> None:
        block = layout.KEY_BLOCK
        window = cache.window or context_length
        self.window = cache.window or 0
        self.capacity = -(-min(context_length, window + max_rows) // block) * block
        if self.capacity < context_length:  # a ring holds whole blocks, of which the first may be half forgotten
            self.capacity += block
        self.cache, self.keys = cache, offset
        self.values = offset + 2 * self.capacity * cache.n_kv_heads * cache.head_dim
        self.end = 2 * self.values - offset

    @property
    def ring(self) -> tuple[int, int]:
        return self.capacity, self.window or self.capacity


class _Slot(Held):
    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__([layer.ring for layer in layers])
        self._memory = _block(layers[-1].end + 4096)  # so that the last block may be prefetched beyond
        self.address = _address(self._memory)


class _Memory:
    """The arrays of a plan, for at most max_rows rows."""

    def __init__(self, plan: Plan, context_length: int, max_rows: int, n_threads: int) -> None:
        self._arrays: dict[str, tuple[Array, int]] = {}
        for buffer in plan.buffers():
            stride = 64 * -(-buffer.cols // 16)
            if buffer.name not in self._arrays and buffer.name != "logits":
                self._arrays[buffer.name] = _block(max_rows * stride + 4096), stride
        self.layers: list[_Layer] = []
        for cache in plan.caches:
            start = self.layers[-1].end if self.layers else 0
            self.layers.append(_Layer(cache, context_length, max_rows, start))
        matmuls = [op for op in plan.ops if isinstance(op, Matmul)]
        packed = max(packed_bytes(op.weight) for op in matmuls)
        columns = max(quant.tile_grid(*op.weight.shape)[1] for op in matmuls) * 64
        self.packed = _block(max_rows * packed)
        self.scratch_bytes = 2 * (-(-max(4096 + 4 * columns, packed) // 4096) * 4096)
        n_queries = [op.q.cols for op in plan.ops if isinstance(op, RopeAppend)]
        sizes = [
            n_partial_floats(max_rows, cols // layer.cache.head_dim, layer.cache.head_dim, layer.capacity, n_threads)
            for cols, layer in zip(n_queries, self.layers, strict=True)
        ]
        self.partials = _block(4 * max(sizes))

    def place(self, buffer: Buffer) -> tuple[int, int]:
        """Address and bytes between rows."""
        array, stride = self._arrays[buffer.name]
        return _address(array), stride


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
        matrix = next(row for row in rows if row["OP"] in of_matmuls)
        for row in reversed(rows):
            row["NEXT_WEIGHT"], row["NEXT_BLOCKS"] = matrix["WEIGHT"], matrix["N_BLOCKS"]
            row["NEXT_BLOCK_BYTES"] = matrix["N_TILES"] * matrix["TILE_BYTES"]
            matrix = row if row["OP"] in of_matmuls else matrix

    def _rows(self) -> Iterator[dict[str, Any]]:
        following = [*self._plan.ops[1:], None]
        for op, after in zip(self._plan.ops, following, strict=True):
            if isinstance(op, Matmul):
                yield from self._matmul(op, joined=isinstance(after, Matmul) and after.same_input)
            elif isinstance(op, Embed):
                yield self._embed(op)
            elif isinstance(op, Angles):
                yield self._angles(op)
            elif isinstance(op, RopeAppend):
                yield {**self._rope_append(op), "OP": self._kernels.op(rope_append), "BARRIER": 1}
            else:
                yield from self._attention(op)

    def _embed(self, op: Embed) -> dict[str, Any]:
        address, stride = self._memory.place(op.out)
        return {
            **_matrix(op.table), "OP": self._kernels.op(embed), "BARRIER": 1, "TARGET": address,
            "TARGET_STRIDE": stride, "COLS": op.table.shape[1], "TABLE_FORMAT": FORMATS.index(op.table.format),
        }  # fmt: skip

    def _angles(self, op: Angles) -> dict[str, Any]:
        address, stride = self._memory.place(op.out)
        return {
            "OP": self._kernels.op(rope_angles), "BARRIER": 1, "TARGET": address, "TARGET_STRIDE": stride,
            "COLS": len(op.frequencies), "ANGLES": op.frequencies.ctypes.data,
        }  # fmt: skip

    def _matmul(self, op: Matmul, joined: bool) -> Iterator[dict[str, Any]]:
        source = op.source if isinstance(op.source, Buffer) else op.source.x
        body = getattr(dots, op.weight.format)
        fields: dict[str, Any] = {
            **_matrix(op.weight), "COLS": op.weight.shape[1], "CODE_BYTES": code_bytes(op.weight), "ADDS": op.adds,
            "ROWS_N": self._most_rows,
             "GATHERS": op.logits, "SAME_INPUT": op.same_input, "PAIR": op.weight.pair,
        }  # fmt: skip
        fields["SOURCE"], fields["SOURCE_STRIDE"] = self._memory.place(source)
        if isinstance(op.source, Normed):
            fields |= {"PROLOGUE": 1, "NORM": op.source.weight.data.ctypes.data, "NORM_EPS": float(op.source.eps)}
            if op.source.bias:
                fields |= {"PROLOGUE": 4, "NORM_BIAS": op.source.bias.data.ctypes.data}
        elif isinstance(op.source, Gated):
            fields["PROLOGUE"] = PROLOGUES[op.source.activation]
        if op.logits:
            fields |= {"TARGET_STRIDE": 64 * fields["N_BLOCKS"], "VOCAB_SIZE": op.weight.shape[0]}
            fields["LOGITS_OP"] = self._kernels.op(matmul)
        else:
            fields["TARGET"], fields["TARGET_STRIDE"] = self._memory.place(op.out)
        for name, n in (("1", 1), ("4", 4), ("N", self._most_rows)):
            if n <= self._most_rows:
                fields[f"DOT_{name}"] = self._kernels.dot(body, n)
        if not op.same_input:
            yield {**fields, "OP": self._kernels.op(prepare), "BARRIER": 2}
        yield {**fields, "OP": self._kernels.op(best if op.logits else matmul), "BARRIER": 0 if joined else 1}

    def _rope_append(self, op: RopeAppend) -> dict[str, Any]:
        layer = self._memory.layers[op.layer]
        places = (self._memory.place(buffer) for buffer in (op.q, op.k, op.v, op.angles.out))
        (q, q_stride), (k, k_stride), (v, _), (angles, angles_stride) = places
        return {
            **self._heads(op.q, layer), "QUERIES": q, "SOURCE_STRIDE": q_stride, "KEYS": k, "TARGET_STRIDE": k_stride,
            "VALUES": v, "ANGLES": angles, "ANGLES_STRIDE": angles_stride,
        }  # fmt: skip

    def _heads(self, q: Buffer, layer: _Layer) -> dict[str, Any]:
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
            "PARTIALS": _address(self._memory.partials), "SCALE": float(op.scale), "BARRIER": 1,
        }  # fmt: skip
        yield {**fields, "OP": self._kernels.op(attention)}
        yield {**fields, "OP": self._kernels.op(attention_merge)}


def _matrix(weight: Tensor) -> dict[str, int]:
    blocks, tiles = quant.tile_grid(*weight.shape)
    return {
        "WEIGHT": weight.data.ctypes.data, "N_BLOCKS": blocks, "N_TILES": tiles,
        "TILE_BYTES": quant.get(weight.format).TILE_BYTES,
    }  # fmt: skip
