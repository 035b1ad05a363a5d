"""What a slot of the CPU backend remembers: one piece of memory, as kernels.layout has it."""

from __future__ import annotations

import mmap
from itertools import pairwise

import numpy as np

from edgellm.architectures import LayerCache
from edgellm.arrays import F32, Array, address
from edgellm.cache import Held, by_group, coded
from edgellm.kernels import attention_q8
from edgellm.kernels.layout import KEY_BLOCK
from edgellm.quant import GROUP


def block(n_bytes: int) -> Array:
    """Zeroed memory that the system gives when it is touched, on a page boundary."""
    return np.frombuffer(mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE)), np.uint8)


class Layer:
    """Where what a layer remembers stands in a slot's memory: keys and values, or what a convolution reads."""

    def __init__(self, cache: LayerCache, context_length: int, max_rows: int, offset: int, kv: str) -> None:
        window = cache.window or context_length
        self.window = cache.window or 0
        self.capacity = -(-min(context_length, window + max_rows) // KEY_BLOCK) * KEY_BLOCK
        if self.capacity < context_length:  # a ring holds whole blocks, of which the first may be half forgotten
            self.capacity += KEY_BLOCK
        self.cache, self.keys = cache, offset
        self.takes_turns = kv == "q8" and cache.n_arrays == 2
        """For each block, values stand behind the keys."""
        heads, values = cache.n_kv_heads * (self.capacity // KEY_BLOCK), cache.n_kv_heads * cache.head_dim
        if self.takes_turns:
            self.values = offset + attention_q8.key_bytes(cache.head_dim)
            self.end = offset + heads * attention_q8.block_bytes(cache.head_dim)
        else:
            self.values = offset + 2 * self.capacity * (values if cache.n_arrays == 2 else -(-values // 16) * 16)
            self.end = 2 * self.values - offset

    @property
    def ring(self) -> tuple[int, int]:
        return self.capacity, self.window or self.capacity

    def bytes_of(self, n_tokens: int) -> int:
        """Of whole blocks, as they are touched."""
        places = min(self.capacity, -(-n_tokens // KEY_BLOCK) * KEY_BLOCK)
        return places * ((self.end - self.keys) // self.capacity)

    def parts(self, memory: Array, length: int) -> list[Array]:
        """What the ring's first `length` places, or all, hold in a slot's memory: (heads, bytes) views."""
        if self.cache.n_arrays == 1:
            return [memory[self.keys : self.end].reshape(self.capacity, -1)[:length]]
        blocks = -(-length // KEY_BLOCK)
        bounds = (self.keys, self.end) if self.takes_turns else (self.keys, self.values, self.end)
        heads = self.cache.n_kv_heads, self.capacity // KEY_BLOCK, -1
        return [memory[start:end].reshape(heads)[:, :blocks] for start, end in pairwise(bounds)]

    def arrays(self, memory: Array) -> list[Array]:
        """The layer's part of a slot's memory: keys and values, or codes and scales of each, by what they are."""
        whole, heads, dims = memory[self.keys : self.end], self.cache.n_kv_heads, self.cache.head_dim
        if self.cache.n_arrays == 1:
            return [whole.view(np.float32).reshape(self.capacity, -1)]
        if not self.takes_turns:
            keys, values = whole.view(np.float16).reshape(2, heads, -1)
            return [keys.reshape(heads, -1, dims, 16), values.reshape(heads, -1, dims)]
        width, groups = attention_q8.width(dims), -(-dims // GROUP)
        blocks = whole.view([
            ("keys", np.uint8, (KEY_BLOCK // 16, width // 4, 16, 4)), ("key_scales", np.float16, (groups, KEY_BLOCK)),
            ("values", np.int8, (KEY_BLOCK, width)), ("value_scales", np.float16, KEY_BLOCK),
        ]).reshape(heads, -1)  # fmt: skip
        return [blocks[name] for name in ("keys", "key_scales", "values", "value_scales")]

    def read(self, memory: Array, positions: Array) -> list[F32]:
        """Keys and values (positions, n_kv_heads, head_dim), or what a convolution reads (positions, channels)."""
        at, dims = positions % self.capacity, self.cache.head_dim
        arrays, number, key = self.arrays(memory), at // KEY_BLOCK, at % KEY_BLOCK
        if self.cache.n_arrays == 1:
            return [arrays[0][at]]
        if not self.takes_turns:
            keys, values = arrays[0][:, at // 16, :, at % 16], arrays[1][:, at].swapaxes(0, 1)
            return [keys.astype(np.float32), values.astype(np.float32)]
        codes = arrays[0][:, number, key // 16, :, key % 16].reshape(len(at), self.cache.n_kv_heads, -1)
        scales = np.repeat(arrays[1][:, number, :, key].astype(np.float32), GROUP, axis=2)[..., :dims]
        keys = (codes[..., :dims].astype(np.float32) - 128) * scales
        values = arrays[2][:, number, key, :dims] * arrays[3][:, number, key, None].astype(np.float32)
        return [keys, values.swapaxes(0, 1)]

    def write(self, memory: Array, positions: Array, content: list[F32]) -> None:
        """The inverse of `read`."""
        at, dims = positions % self.capacity, self.cache.head_dim
        arrays, number, key = self.arrays(memory), at // KEY_BLOCK, at % KEY_BLOCK
        if self.cache.n_arrays == 1:
            arrays[0][at] = content[0]
        elif not self.takes_turns:
            arrays[0][:, at // 16, :, at % 16], arrays[1][:, at] = content[0], content[1].swapaxes(0, 1)
        else:
            width = attention_q8.width(dims)
            codes, scales = coded(by_group(content[0]))
            quads = codes.reshape(*codes.shape[:2], -1)[..., :width].reshape(*codes.shape[:2], -1, 4) + 128
            arrays[0][:, number, key // 16, :, key % 16], arrays[1][:, number, :, key] = quads, scales[..., 0]
            codes, scales = coded(content[1].swapaxes(0, 1))
            arrays[2][:, number, key, :dims], arrays[3][:, number, key] = codes, scales[..., 0]


class Slot(Held):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__([layer.ring for layer in layers])
        self._layers, self._memory = layers, block(slot_bytes(layers))
        self.address = address(self._memory)

    def parts(self, length: int) -> list[Array]:
        return [part for layer in self._layers for part in layer.parts(self._memory, length)]

    def read(self, layer: int, positions: Array) -> list[F32]:
        return self._layers[layer].read(self._memory, positions)

    def write(self, layer: int, positions: Array, content: list[F32]) -> None:
        self._layers[layer].write(self._memory, positions, content)


def slot_bytes(layers: list[Layer]) -> int:
    return layers[-1].end + 4096  # so that the last block may be prefetched beyond
