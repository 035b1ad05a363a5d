"""A plan's ops -> records, which kernels read: addresses, sizes, and the kernels that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgellm import quant
from edgellm.arrays import Array, address
from edgellm.backends._cpu_cache import Layer
from edgellm.backends._cpu_memory import Memory, code_bytes
from edgellm.kernels import Compiler, dots, layout
from edgellm.kernels.attention import UNIT, attention, attention_merge
from edgellm.kernels.best import best
from edgellm.kernels.experts import combine, expert_matmul, expert_prepare, route
from edgellm.kernels.matmul import matmul
from edgellm.kernels.prepare import prepare
from edgellm.kernels.rows import FORMATS, apply, embed, rope_angles, rope_append, short_conv
from edgellm.kernels.share import N_CLAIMS
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
    Plan,
    RopeAppend,
    Route,
    ShortConv,
    Source,
    Turned,
    buffer_of,
)
from edgellm.tensor import Tensor

ACTIVATIONS = {"silu": layout.SILU, "gelu": layout.GELU, "gelu_tanh": layout.GELU_TANH, "relu2": layout.RELU2}


def cells(count: int, prefix: str, fields: dict[str, Any]) -> Array:
    """A record or a step: numbers in the cells that layout names."""
    cells = np.zeros(count, np.int64)
    for name, value in fields.items():
        at = getattr(layout, prefix + name) // layout.CELL
        if isinstance(value, float):
            cells[at : at + 1].view(np.float32)[0] = value
        else:
            cells[at] = value
    return cells


class Lowering:
    """A plan's ops -> records: addresses, sizes, and the kernels that they ask for."""

    def __init__(self, kernels: Compiler, plan: Plan, memory: Memory, most_rows: int) -> None:
        self._kernels, self._plan, self._memory, self._most_rows = kernels, plan, memory, most_rows

    def records(self) -> Array:
        """(ops, RECORD_CELLS) int64."""
        rows = list(self._rows())
        self._chain(rows)
        return np.stack([cells(layout.RECORD_CELLS, "", fields) for fields in rows])

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
        fields["BARRIER"] = 4 if fields["N_HEADS"] // fields["N_KV_HEADS"] <= UNIT else 1
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
