"""The definition of correct: every op in NumPy, float32 throughout, on weights dequantized once.

It needs no compiler and no particular CPU, and it is what every other backend is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
from threadpoolctl import ThreadpoolController

from edgellm import quant
from edgellm.adapter import Adapter, LowRank
from edgellm.architectures import Architecture
from edgellm.arrays import F32, I32, Array
from edgellm.backends import best_tokens
from edgellm.cache import SlotCache, Slots, ring_shape
from edgellm.footprint import Footprint
from edgellm.ops import Activation
from edgellm.plan import Plan, record
from edgellm.step import Step
from edgellm.tensor import Tensor, Weights

GELU, SQRT_HALF = np.float32((2 / np.pi) ** 0.5), np.float32(0.5**0.5)
_ERF = np.vectorize(math.erf, otypes=[np.float64])


class Backend(Slots[SlotCache]):
    MAX_ROWS = 512

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        tensors: dict[str, Tensor],
        context_length: int,
        n_threads: int | None = None,
        kv: str = "f16",
    ) -> None:
        self.CACHE_LAYOUT, self._kv = ("float32 1" if kv == "f16" else f"float32 of {kv} 1"), kv
        self._architecture, self._config, self._weights = architecture, config, Weights(tensors)
        self._record: Callable[[], Plan] = partial(record, architecture, config, tensors)
        self._blas, self._n_threads = ThreadpoolController(), n_threads
        super().__init__(context_length)
        self._layers = architecture.caches(config)
        self._dense: dict[str, F32] = {}
        self._weight_bytes = 4 * sum(math.prod(tensor.shape) for tensor in tensors.values())
        self._adapters: WeakSet[Adapter] = WeakSet()

    @property
    def footprint(self) -> Footprint:
        return Footprint(
            weights=self._weight_bytes,
            cache=self.bytes_of(self._context_length),
            arena=0,
            adapters=sum(adapter.n_bytes for adapter in self._adapters),
        )

    def bytes_of(self, n_tokens: int) -> int:
        shapes = ((layer, ring_shape(layer, self._context_length, self.MAX_ROWS)) for layer in self._layers)
        return sum(
            4 * layer.n_arrays * min(n_tokens, capacity) * n_kv_heads * head_dim
            for layer, (capacity, n_kv_heads, head_dim) in shapes
        )

    def _new_slot(self) -> SlotCache:
        return SlotCache(self._layers, self._context_length, self.MAX_ROWS, self._kv)

    def adapt(self, adapter: Adapter) -> None:
        self._adapters.add(adapter)

    def _recorded(self) -> Plan:
        return self._record()

    def _rings(self) -> list[tuple[int, int]]:
        shapes = [ring_shape(layer, self._context_length, self.MAX_ROWS) for layer in self._layers]
        return [(shape[0], layer.window or shape[0]) for layer, shape in zip(self._layers, shapes, strict=True)]

    def run(self, step: Step) -> F32:
        return self._forward(step, _Ops)

    def hidden(self, step: Step) -> F32:
        return self._forward(step, _OpsToHidden)

    def _forward(self, step: Step, ops: type[_Ops]) -> F32:
        self._begin(step)
        with self._blas.limit(limits=self._n_threads, user_api="blas"):
            result = self._architecture.forward(self._config, self._weights, ops(step, self._slots, self._dense))
        self._end(step)
        return result

    def best(self, step: Step) -> I32:
        return best_tokens(self.run(step))

    def close(self) -> None:
        self._slots, self._dense, self._weights, self._record = {}, {}, Weights({}), Plan


class _Ops:
    """The ops of one step, computed at once: X is a (rows, size) float32 array."""

    def __init__(self, step: Step, slots: dict[int, SlotCache], dense: dict[str, F32]) -> None:
        self._step, self._slots, self._dense = step, slots, dense
        self._pairs: Mapping[str, LowRank] = step.adapter.pairs if step.adapter else {}

    def embed(self, table: Tensor, scale: float = 1.0) -> F32:
        x: F32 = rows_of(table, self._step.tokens) * np.float32(scale)
        return x

    def add_positions(self, x: F32, table: Tensor) -> F32:
        return x + rows_of(table, self._step.positions)

    def linear(self, x: F32, weight: Tensor, bias: Tensor | None = None) -> F32:
        y: F32 = x @ self._values(weight).T
        if pair := self._pairs.get(weight.name):
            y += x @ pair.a.T @ pair.b.T
        return y if bias is None else y + vector(bias)

    def add(self, x: F32, y: F32, scale: float = 1.0) -> F32:
        total: F32 = x + np.float32(scale) * y
        return total

    def rms_norm(self, x: F32, weight: Tensor, eps: float) -> F32:
        heads: F32 = x.reshape(-1, weight.shape[0])
        mean_square: F32 = np.mean(heads * heads, axis=1, keepdims=True)
        normed: F32 = heads / np.sqrt(mean_square + np.float32(eps)) * vector(weight)
        return normed.reshape(x.shape)

    def layer_norm(self, x: F32, weight: Tensor, bias: Tensor | None, eps: float) -> F32:
        centred: F32 = x - np.mean(x, axis=1, keepdims=True)
        y = self.rms_norm(centred, weight, eps)
        return y if bias is None else y + vector(bias)

    def activate(self, x: F32, activation: Activation) -> F32:
        return activate(x, activation)

    def glu(self, x: F32, activation: Activation) -> F32:
        gate, up = np.split(x, 2, axis=1)
        y: F32 = activate(gate, activation) * up
        return y

    def rope(self, x: F32, head_dim: int, frequencies: F32, scale: float = 1.0) -> F32:
        n, heads = len(frequencies), x.reshape(len(x), -1, head_dim)
        angles = self._step.positions.astype(np.float32)[:, None, None] * frequencies  # (rows, 1, n)
        cos, sin = np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)
        first, second, rest = np.split(heads, [n, 2 * n], axis=2)
        turned: F32 = np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=2)
        return turned.reshape(x.shape)

    def attention(self, q: F32, k: F32, v: F32, layer: int, scale: float, softcap: float = 0.0) -> F32:
        out = np.empty_like(q)
        for slot, rows in self._step.by_slot:
            ring, positions = self._slots[slot].rings[layer], self._step.positions[rows]
            ring.append(positions, k[rows], v[rows])
            seen, keys, values = ring.span(int(positions[0]), int(positions[-1]))
            hidden = (seen > positions[:, None]) | (seen <= positions[:, None] - ring.window)
            out[rows] = attend(q[rows], keys, values, hidden, scale, softcap)
        return out

    def short_conv(self, x: F32, weight: Tensor, layer: int) -> F32:
        b, c, u = np.split(x, 3, axis=1)
        n, kernel = weight.shape
        taps, out = self._values(weight), np.empty((len(x), n), np.float32)
        for slot, rows in self._step.by_slot:
            ring, positions = self._slots[slot].rings[layer], self._step.positions[rows]
            gated: F32 = b[rows] * u[rows]
            ring.append(positions, gated)
            seen, earlier = ring.span(int(positions[0]), int(positions[-1]))
            before = np.zeros((kernel - 1 - int(positions[0] - seen[0]), n), np.float32)
            values: F32 = np.concatenate([before, earlier.reshape(-1, n)])
            summed = sum(values[j : j + len(positions)] * taps[:, j] for j in range(kernel))
            out[rows] = c[rows] * summed
        return out

    def experts(
        self,
        x: F32,
        router: Tensor,
        gate_up: Sequence[Tensor],
        down: Sequence[Tensor],
        n_used: int,
        activation: Activation,
        normalize: bool,
    ) -> F32:
        probabilities = softmax(self.linear(x, router))
        used = np.argsort(-probabilities, axis=1, kind="stable")[:, :n_used]
        shares: F32 = np.take_along_axis(probabilities, used, axis=1)
        if normalize:
            total: F32 = shares.sum(axis=1, keepdims=True)
            shares = shares / total
        out = np.zeros_like(x)
        for expert in np.unique(used):
            rows, places = np.nonzero(used == expert)
            h = self.glu(self.linear(x[rows], gate_up[expert]), activation)
            out[rows] += shares[rows, places][:, None] * self.linear(h, down[expert])
        return out

    def logits(self, x: F32, table: Tensor, scale: float = 1.0, softcap: float = 0.0) -> F32:
        y: F32 = self.linear(x[self._step.wanted], table) * np.float32(scale)
        return capped(y, softcap)

    def _values(self, weight: Tensor) -> F32:
        """(rows, cols) of a matrix, dequantized once and kept."""
        if weight.name not in self._dense:
            self._dense[weight.name] = matrix(weight)
        return self._dense[weight.name]


class _OpsToHidden(_Ops):
    """A model that stops before its logits."""

    def logits(self, x: F32, table: Tensor, scale: float = 1.0, softcap: float = 0.0) -> F32:
        return x


def attend(q: F32, keys: F32, values: F32, hidden: Array, scale: float, softcap: float = 0.0) -> F32:
    """softmax(q k^T * scale) v for each head, the scores capped. q (rows, n_heads * head_dim), keys and values (seen,
    n_kv_heads, head_dim), hidden (rows, seen) -> as q."""
    rows, (seen, n_kv_heads, head_dim) = len(q), keys.shape
    # Query heads that share keys stand together: (n_kv_heads, group, rows, head_dim).
    grouped: F32 = q.reshape(rows, n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    folded: F32 = grouped.reshape(n_kv_heads, -1, head_dim)
    scores = (folded @ keys.transpose(1, 2, 0) * np.float32(scale)).reshape(n_kv_heads, -1, rows, seen)
    weights = softmax(np.where(hidden, np.float32(-np.inf), capped(scores, softcap))).reshape(n_kv_heads, -1, seen)
    out: F32 = (weights @ values.transpose(1, 0, 2)).reshape(grouped.shape).transpose(2, 0, 1, 3)
    return out.reshape(q.shape)


def softmax(x: F32) -> F32:
    """Along the last axis."""
    e: F32 = np.exp(x - x.max(-1, keepdims=True))
    total: F32 = e.sum(-1, keepdims=True)
    return e / total


def capped(x: F32, softcap: float) -> F32:
    """softcap * tanh(x / softcap), or x for a softcap of 0."""
    cap = np.float32(softcap)
    y: F32 = cap * np.tanh(x / cap) if softcap else x
    return y


def activate(x: F32, activation: Activation) -> F32:
    """x times its gate, which is 0..1 but for relu2; sigmoid(x) is written with tanh because that cannot overflow."""
    half = np.float32(0.5)
    if activation == "relu2":
        y: F32 = np.square(np.maximum(x, 0))
        return y
    if activation == "gelu":
        gate: F32 = half * (1 + erf(x * SQRT_HALF))
    elif activation == "gelu_tanh":
        gate = half * (1 + np.tanh(GELU * (x + np.float32(0.044715) * x**3)))
    else:
        gate = half * (1 + np.tanh(x * half))
    return x * gate


def erf(x: F32) -> F32:
    """The error function, by math.erf: NumPy has none."""
    y: F32 = _ERF(x).astype(np.float32)
    return y


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
