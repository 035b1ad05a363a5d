"""What a slot remembers of its tokens, for the NumPy backend: float32, one ring a layer.

A cache of the kind "q8" gives back other keys and values than were put into it: `rounded` defines which.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from edgellm.architectures import LayerCache
from edgellm.arrays import F16, F32, I32, Array
from edgellm.errors import ArgumentError
from edgellm.moves import Moves
from edgellm.plan import Plan
from edgellm.quant import GROUP, divide, to_f16
from edgellm.step import Step

KINDS = ("f16", "q8")
"""Of keys and values. Backends that compute in float32 take "f16" for what they have anyway."""


def check_kind(kv: str) -> None:
    if kv not in KINDS:
        raise ArgumentError(f"kv is {kv!r}; expected {' or '.join(KINDS)}")


def rounded(keys: F32, values: F32) -> tuple[F32, F32]:
    """What is left of keys and values (..., head_dim) in 8 bits, with a float16 scale for GROUP dimensions of a key, as
    in the weight format q8, and for a whole value. NaN where a number under the same scale is not finite."""
    of_keys = _rounded(by_group(keys)).reshape(*keys.shape[:-1], -1)[..., : keys.shape[-1]]
    return of_keys, _rounded(values)


def _rounded(groups: F32) -> F32:
    codes, scale = coded(groups)
    result: F32 = codes * scale.astype(np.float32)
    return result


def coded(groups: F32) -> tuple[F32, F16]:
    """Codes and scale (..., 1) of groups along the last axis."""
    with np.errstate(invalid="ignore"):
        scale = to_f16(np.abs(groups).max(-1, keepdims=True) / np.float32(127))
        return np.clip(np.rint(divide(groups, scale)), -127, 127), scale


def by_group(keys: F32) -> F32:
    """(..., head_dim) -> (..., groups, GROUP), filled up with zeros."""
    padding = [(0, 0)] * (keys.ndim - 1) + [(0, -keys.shape[-1] % GROUP)]
    return np.pad(keys, padding).reshape(*keys.shape[:-1], -1, GROUP)


class Ring:
    """What one layer remembers, by position modulo the capacity: a window costs little more than its size."""

    def __init__(self, layer: LayerCache, context_length: int, max_rows: int, kv: str = "f16") -> None:
        self.window, self._rounds = layer.window or context_length, kv == "q8" and layer.n_arrays == 2
        shape = ring_shape(layer, context_length, max_rows)
        self.capacity, self._arrays = shape[0], [untouched(shape) for _ in range(layer.n_arrays)]

    def parts(self, length: int) -> list[Array]:
        return [array[:length] for array in self._arrays]

    def read(self, positions: Array) -> list[F32]:
        """Of each array (positions, n_kv_heads, head_dim)."""
        return [array[positions % self.capacity] for array in self._arrays]

    def append(self, positions: I32, *values: F32) -> None:
        """An array each of (rows, n_kv_heads * head_dim)."""
        at = positions % self.capacity
        heads = [rows.reshape(-1, *array.shape[1:]) for array, rows in zip(self._arrays, values, strict=True)]
        for array, rows in zip(self._arrays, rounded(*heads) if self._rounds else heads, strict=True):
            array[at] = rows

    def span(self, first: int, last: int) -> tuple[Array, ...]:
        """What rows at first..last may see: positions, and of each array (positions, n_kv_heads, head_dim)."""
        positions = np.arange(max(0, first - self.window + 1), last + 1)
        if self.capacity > last:
            at: slice | Array = slice(int(positions[0]), last + 1)
        else:
            at = positions % self.capacity
        return positions, *(array[at] for array in self._arrays)


def ring_shape(layer: LayerCache, context_length: int, max_rows: int) -> tuple[int, int, int]:
    """(positions, n_kv_heads, head_dim) of each of a ring's arrays."""
    window = layer.window or context_length
    return min(context_length, window + max_rows), layer.n_kv_heads, layer.head_dim


def untouched(shape: tuple[int, ...]) -> F32:
    """Zeros whose memory is only taken when it is written, so that a long context costs what is used of it.

    np.zeros promises that no more than calloc does, which clears memory that it has lying around.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), np.float32).reshape(shape)


Turned = Callable[[int, F32, int], F32]
"""Keys of a layer -> those of so many positions before theirs; see Moves."""


class Held:
    """How many tokens a slot holds, and how many positions were ever written to its rings of (capacity, window)."""

    def __init__(self, rings: Sequence[tuple[int, int]]) -> None:
        self._rings = rings
        self.length = 0
        self._reserved = self._written = 0
        self._lost = 0
        """Positions before it were overwritten in a ring before tokens moved up to them."""

    def reserve(self, rows: int) -> None:
        """Say that positions length..length + rows are about to be written, even if the step then fails."""
        self._reserved, self._written = rows, max(self._written, self.length + rows)

    def advance(self) -> None:
        """Hold what was reserved last."""
        self.length += self._reserved

    def kept(self, length: int) -> int:
        """`length`, or 0 if a window has lost what the token after so many would see."""
        lost = any(
            (self._written > capacity and self._written - length > capacity - window)
            or (self._lost and window < capacity and length - window < self._lost)
            for capacity, window in self._rings
        )
        return 0 if lost else length

    def trim(self, length: int) -> int:
        """Keep the first `length` tokens, or none, as `kept` says."""
        self.length = self.kept(length)
        if self.length == 0:
            self._written = self._lost = 0
        return self.length

    def drop(self, first: int, count: int, turned: Turned) -> None:
        """Forget `count` tokens from `first` on; those after them move up. Each window sees none before them."""
        for layer, (capacity, _) in enumerate(self._rings):
            positions = np.arange(max(first + count, self._written - capacity), self.length)
            content = self.read(layer, positions)
            if len(content) == 2:
                content[0] = turned(layer, content[0], count)
            self.write(layer, positions - count, content)
        if any(self._written > capacity for capacity, _ in self._rings):
            self._lost = first
        self.length, self._written = self.length - count, self._written - count

    def copy(self, other: Held, length: int) -> int:
        """Hold the first `length` tokens of another slot; return how many are held, as of `trim`."""
        for mine, theirs in zip(self.parts(length), other.parts(length), strict=True):
            mine[:] = theirs
        self._written, self._lost, self.length = other._written, other._lost, other.length
        return self.trim(length)

    def content(self) -> tuple[int, list[Array]]:
        """How many positions were ever written, and what is remembered of the tokens held."""
        return self._written, self.parts(self.length)

    def restore(self, length: int, written: int) -> list[Array]:
        """Hold `length` tokens, whose `content` the caller puts into the arrays returned."""
        self.length, self._written, self._lost = length, written, 0
        return self.parts(length)

    def parts(self, length: int) -> list[Array]:
        """Views into the slot's memory: the positions before `length` in a ring's first places, or all of the ring."""
        raise NotImplementedError

    def read(self, layer: int, positions: Array) -> list[F32]:
        """What a layer remembers of some positions: keys and values (positions, n_kv_heads, head_dim), or an array."""
        raise NotImplementedError

    def write(self, layer: int, positions: Array, content: list[F32]) -> None:
        """The inverse of `read`."""
        raise NotImplementedError


class SlotCache(Held):
    """The cache of one slot: a ring for each layer that remembers."""

    def __init__(self, layers: Sequence[LayerCache], context_length: int, max_rows: int, kv: str = "f16") -> None:
        self.rings = [Ring(layer, context_length, max_rows, kv) for layer in layers]
        super().__init__([(ring.capacity, ring.window) for ring in self.rings])

    def parts(self, length: int) -> list[Array]:
        return [part for ring in self.rings for part in ring.parts(length)]

    def read(self, layer: int, positions: Array) -> list[F32]:
        return self.rings[layer].read(positions)

    def write(self, layer: int, positions: Array, content: list[F32]) -> None:
        self.rings[layer].append(positions, *content)


H = TypeVar("H", bound=Held)


class Slots(Generic[H]):
    """What backends share: the open slots, which a backend makes by `_new_slot`, and their part in a step."""

    MAX_ROWS: int

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length
        self._slots: dict[int, H] = {}

    def _new_slot(self) -> H:
        raise NotImplementedError

    def open_slot(self) -> int:
        slot = max(self._slots, default=-1) + 1
        self._slots[slot] = self._new_slot()
        return slot

    def close_slot(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def trim(self, slot: int, length: int) -> int:
        return self._slots[slot].trim(length)

    def kept(self, slot: int, length: int) -> int:
        return self._slots[slot].kept(length)

    def copy(self, source: int, target: int, length: int) -> int:
        assert length <= self._slots[source].length
        return self._slots[target].copy(self._slots[source], length)

    def drop(self, slot: int, first: int, count: int) -> None:
        assert 0 <= first <= first + count <= self._slots[slot].length
        self._slots[slot].drop(first, count, self._moves.turned)

    def least_latest(self) -> int:
        _ = self._moves  # which raises
        return max((window for capacity, window in self._rings() if capacity < self._context_length), default=1)

    @cached_property
    def _moves(self) -> Moves:
        return Moves(self._recorded())

    def _recorded(self) -> Plan:
        """The model's plan."""
        raise NotImplementedError

    def _rings(self) -> list[tuple[int, int]]:
        """(capacity, window) of the layers that remember."""
        raise NotImplementedError

    def content(self, slot: int) -> tuple[int, list[Array]]:
        return self._slots[slot].content()

    def restore(self, slot: int, length: int, written: int) -> list[Array]:
        assert length <= self._context_length
        return self._slots[slot].restore(length, written)

    def _begin(self, step: Step) -> None:
        """Kernels write where the step says, unchecked: its rows must follow what is held, and fit."""
        assert len(step.tokens) <= self.MAX_ROWS
        for slot, rows in step.by_slot:
            held, positions = self._slots[slot].length, step.positions[rows].tolist()
            assert positions == list(range(held, held + len(positions)))
            assert held + len(positions) <= self._context_length
            self._slots[slot].reserve(len(positions))

    def _end(self, step: Step) -> None:
        for slot, _ in step.by_slot:
            self._slots[slot].advance()
