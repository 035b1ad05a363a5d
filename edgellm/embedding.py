"""Ids -> a direction for each text: what logits are computed from, pooled; of several short texts in one step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from edgellm.arrays import F32, Array
from edgellm.errors import ArgumentError
from edgellm.generate import Slot, evaluate
from edgellm.samplers import checked

POOLINGS = ("mean", "last")
AT_ONCE = 16
"""Texts in a step."""

Ids = Sequence[int]
Steps = Generator[list[F32], None, None]
"""After each step of the model, the vectors that are complete."""


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ArgumentError(f"pooling is {pooling!r}; expected {' or '.join(POOLINGS)}")


def groups(lengths: Sequence[int], max_rows: int) -> Iterator[slice]:
    """Texts of so many ids in their order, as many together as a step holds; one that is longer alone."""
    begin = n_rows = 0
    for i, length in enumerate(lengths):
        if i > begin and (n_rows + length > max_rows or i - begin == AT_ONCE):
            yield slice(begin, i)
            begin, n_rows = i, 0
        n_rows += length
    if lengths:
        yield slice(begin, len(lengths))


@contextmanager
def opened(open_slot: Callable[[], Slot], n: int) -> Iterator[list[Slot]]:
    """So many slots, closed at the end."""
    slots: list[Slot] = []
    try:
        for _ in range(n):
            slots.append(open_slot())
        yield slots
    finally:
        for slot in slots:
            slot.close()


def embeddings(open_slot: Callable[[], Slot], group: Sequence[Ids], pooling: str) -> Steps:
    """Vectors: (hidden_size,) float32 of length 1, which are the same in any group, of texts that each have an id at
    least. Closing it early lets go of the slots."""
    with opened(open_slot, len(group)) as slots:
        if len(group) == 1:
            yield from _alone(slots[0], group[0], pooling)
        else:
            yield _together(slots, group, pooling)


def _alone(slot: Slot, ids: Ids, pooling: str) -> Iterator[list[F32]]:
    pooled: Array | None = None
    for begin in range(0, len(ids), slot.max_rows):
        rows = slot.hidden(ids[begin : begin + slot.max_rows])
        pooled = _pooled(rows, pooling) if pooled is None or pooling == "last" else pooled + _pooled(rows, pooling)
        yield [] if begin + slot.max_rows < len(ids) else [_normed(pooled)]


def _together(slots: Sequence[Slot], group: Sequence[Ids], pooling: str) -> list[F32]:
    rows = evaluate([(slot, ids, range(0)) for slot, ids in zip(slots, group, strict=True)], slots[0].backend.hidden)
    ends = np.cumsum([len(ids) for ids in group])
    return [_normed(_pooled(part, pooling)) for part in np.split(rows, ends[:-1])]


def _pooled(rows: F32, pooling: str) -> Array:
    """(n, hidden_size) -> (hidden_size,) float64, of any length."""
    pooled: Array = rows[-1].astype(np.float64) if pooling == "last" else rows.sum(axis=0, dtype=np.float64)
    return pooled


def _normed(pooled: Array) -> F32:
    length = np.linalg.norm(pooled)
    checked(0 if np.isfinite(length) and length else -1)
    found: F32 = (pooled / length).astype(np.float32)
    return found
