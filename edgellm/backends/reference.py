"""The definition of correct: every op in NumPy, float32 throughout, on weights dequantized once.

It needs no compiler and no particular CPU, and it is what every other backend is tested against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from edgellm import quant
from edgellm.architectures import Architecture
from edgellm.arrays import F32, I32, Array
from edgellm.backends import best_tokens
from edgellm.cache import SlotCache, Slots
from edgellm.ops import Activation
from edgellm.step import Step
from edgellm.tensor import Tensor, Weights

GELU = np.float32((2 / np.pi) ** 0.5)


class Backend(Slots[SlotCache]):
    MAX_ROWS = 512

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        tensors: dict[str, Tensor],
        context_length: int,
        n_threads: int | None = None,
    ) -> None:
        self._architecture, self._config, self._weights = architecture, config, Weights(tensors)
        self._blas, self._n_threads = ThreadpoolController(), n_threads
        super().__init__(context_length)
        self._layers = architecture.caches(config)
        self._dense: dict[str, F32] = {}

    def _new_slot(self) -> SlotCache:
        return SlotCache(self._layers, self._context_length, self.MAX_ROWS)

    def run(self, step: Step) -> F32:
        self._begin(step)
        with self._blas.limit(limits=self._n_threads, user_api="blas"):
            logits = self._architecture.forward(self._config, self._weights, _Ops(step, self._slots, self._dense))
        self._end(step)
        return logits

    def best(self, step: Step) -> I32:
        return best_tokens(self.run(step))

    def close(self) -> None:
        self._slots, self._dense, self._weights = {}, {}, Weights({})


class _Ops:
    """The ops of one step, computed at once: X is a (rows, size) float32 array."""

    def __init__(self, step: Step, slots: dict[int, SlotCache], dense: dict[str, F32]) -> None:
        self._step, self._slots, self._dense = step, slots, dense

    def embed(self, table: Tensor) -> F32:
        return rows_of(table, self._step.tokens)

    def linear(self, x: F32, weight: Tensor, bias: Tensor | None = None) -> F32:
        y: F32 = x @ self._values(weight).T
        return y if bias is None else y + vector(bias)

    def add(self, x: F32, y: F32) -> F32:
        return x + y

    def rms_norm(self, x: F32, weight: Tensor, eps: float) -> F32:
        mean_square: F32 = np.mean(x * x, axis=1, keepdims=True)
        normed: F32 = x / np.sqrt(mean_square + np.float32(eps))
        return normed * vector(weight)

    def layer_norm(self, x: F32, weight: Tensor, bias: Tensor, eps: float) -> F32:
        centred: F32 = x - np.mean(x, axis=1, keepdims=True)
        return self.rms_norm(centred, weight, eps) + vector(bias)

    def glu(self, x: F32, activation: Activation) -> F32:
        gate, up = np.split(x, 2, axis=1)
        y: F32 = activate(gate, activation) * up
        return y

    def rope(self, x: F32, head_dim: int, frequencies: F32) -> F32:
        angles = self._step.positions.astype(np.float32)[:, None, None] * frequencies  # (rows, 1, head_dim / 2)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = np.split(x.reshape(len(x), -1, head_dim), 2, axis=2)
        turned: F32 = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)
        return turned.reshape(x.shape)

    def attention(self, q: F32, k: F32, v: F32, layer: int, scale: float) -> F32:
        out = np.empty_like(q)
        for slot, rows in self._step.by_slot:
            ring, positions = self._slots[slot].rings[layer], self._step.positions[rows]
            ring.append(positions, k[rows], v[rows])
            seen, keys, values = ring.span(int(positions[0]), int(positions[-1]))
            hidden = (seen > positions[:, None]) | (seen <= positions[:, None] - ring.window)
            out[rows] = attend(q[rows], keys, values, hidden, scale)
        return out

    def logits(self, x: F32, table: Tensor) -> F32:
        return self.linear(x[self._step.wanted], table)

    def _values(self, weight: Tensor) -> F32:
        """(rows, cols) of a matrix, dequantized once and kept."""
        if weight.name not in self._dense:
            self._dense[weight.name] = matrix(weight)
        return self._dense[weight.name]


def attend(q: F32, keys: F32, values: F32, hidden: Array, scale: float) -> F32:
    """softmax(q k^T * scale) v for each head. q (rows, n_heads * head_dim), keys and values (seen, n_kv_heads,
    head_dim), hidden (rows, seen) -> as q."""
    rows, (seen, n_kv_heads, head_dim) = len(q), keys.shape
    # Query heads that share keys stand together: (n_kv_heads, group, rows, head_dim).
    grouped: F32 = q.reshape(rows, n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    folded: F32 = grouped.reshape(n_kv_heads, -1, head_dim)
    scores = (folded @ keys.transpose(1, 2, 0) * np.float32(scale)).reshape(n_kv_heads, -1, rows, seen)
    weights = softmax(np.where(hidden, np.float32(-np.inf), scores)).reshape(n_kv_heads, -1, seen)
    out: F32 = (weights @ values.transpose(1, 0, 2)).reshape(grouped.shape).transpose(2, 0, 1, 3)
    return out.reshape(q.shape)


def softmax(x: F32) -> F32:
    """Along the last axis."""
    e: F32 = np.exp(x - x.max(-1, keepdims=True))
    total: F32 = e.sum(-1, keepdims=True)
    return e / total


def activate(x: F32, activation: Activation) -> F32:
    """silu: x * sigmoid(x), by tanh because it cannot overflow; gelu_tanh: arXiv:1606.08415's approximation."""
    half = np.float32(0.5)
    inner: F32 = x * half if activation == "silu" else GELU * (x + np.float32(0.044715) * x**3)
    gate: F32 = half * (1 + np.tanh(inner))
    return x * gate


def vector(tensor: Tensor) -> F32:
    return tensor.data[: tensor.shape[0]]


def rows_of(tensor: Tensor, rows: Array) -> F32:
    """Some rows of a matrix that is not paired: (len(rows), cols)."""
    assert not tensor.pair
    blocks, place = np.divmod(rows, quant.TILE_ROWS)
    fmt = quant.get(tensor.format)
    values = fmt.dequantize(fmt.unpack(tensor.data[blocks], len(rows) * quant.TILE_ROWS, tensor.shape[1]))
    return values[np.arange(len(rows)) * quant.TILE_ROWS + place]


def matrix(tensor: Tensor) -> F32:
    """All values of a matrix: (rows, cols). Dequantized some row blocks at a time, so that little more is needed."""
    fmt, (rows, cols) = quant.get(tensor.format), tensor.shape
    order = quant.paired(rows, tensor.pair) if tensor.pair else np.arange(rows)
    values = np.empty((rows, cols), np.float32)
    step = max(1, (1 << 20) // (quant.TILE_ROWS * cols))
    for block in range(0, len(tensor.data), step):
        at = order[block * quant.TILE_ROWS : (block + step) * quant.TILE_ROWS]
        values[at] = fmt.dequantize(fmt.unpack(tensor.data[block : block + step], len(at), cols))
    return values
