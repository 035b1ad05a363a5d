"""The memory that a plan's steps use: what ops leave for each other, and what kernels need on the way."""

from __future__ import annotations

import numpy as np

from edgellm import quant
from edgellm.arrays import F32, Array, address
from edgellm.backends._cpu_cache import Layer, block
from edgellm.kernels.attention import n_partial_floats
from edgellm.plan import Apply, Attention, Buffer, ExpertMatmul, Matmul, Plan, Route
from edgellm.tensor import Tensor

QUANTIZED = ("q2t", "q4", "q4m", "q8")


class Memory:
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
        packed = max(self._max_rows * op.out.times * packed_bytes(one(op)) for op in matmuls)
        self.packed = self.packed if packed <= self.packed.nbytes else block(packed)
        columns = max(-(-cols // 64) * 64 for cols in (
            *(one(op).shape[1] for op in matmuls), *(op.out.cols for op in plan.ops if isinstance(op, Apply)),
        ))  # fmt: skip
        scratch = max(4096 + 4 * columns, *(packed_bytes(one(op)) for op in matmuls))
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


def one(op: Matmul | ExpertMatmul) -> Tensor:
    """The matrix, or one of those, which are alike."""
    return op.weight if isinstance(op, Matmul) else op.weights[0]


def packed_bytes(weight: Tensor) -> int:
    """Bytes of one row of activations, prepared for a matrix."""
    tiles = quant.tile_grid(*weight.shape)[1]
    return tiles * (64 * code_bytes(weight) + 56)


def code_bytes(weight: Tensor) -> int:
    return 1 if weight.format in QUANTIZED else 4
