"""One run of a model: rows of (token, slot, position), in any mixture of prompt chunks and decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgellm.adapter import Adapter
from edgellm.arrays import I32, Array


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of one slot are at positions that follow what the slot's cache holds."""

    tokens: I32
    slots: I32
    positions: I32
    wanted: Array
    """Indices of the rows whose logits are computed."""
    adapter: Adapter | None = None
    """Of all rows."""

    @classmethod
    def chunk(
        cls,
        slot: int,
        first: int,
        tokens: Sequence[int],
        wanted: Sequence[int] | None = None,
        adapter: Adapter | None = None,
    ) -> Step:
        """Consecutive tokens of one slot; by default the logits of the last one are wanted."""
        n = len(tokens)
        ids, slots, positions = np.empty((3, n), np.int32)
        ids[:], slots[:], positions[:] = tokens, slot, range(first, first + n)
        return cls(ids, slots, positions, np.array([n - 1] if wanted is None else wanted, np.intp), adapter)

    @classmethod
    def join(cls, steps: Sequence[Step]) -> Step:
        """The rows of several steps with one adapter, one after the other; no slot is in two of them."""
        if len(steps) == 1:
            return steps[0]
        assert all(step.adapter is steps[0].adapter for step in steps)
        starts = np.cumsum([0, *(len(step.tokens) for step in steps[:-1])])
        wanted = [step.wanted + start for step, start in zip(steps, starts, strict=True)]
        columns = ([getattr(step, name) for step in steps] for name in ("tokens", "slots", "positions"))
        tokens, slots, positions = (np.concatenate(column) for column in columns)
        return cls(tokens, slots, positions, np.concatenate(wanted), steps[0].adapter)

    @cached_property
    def by_slot(self) -> list[tuple[int, Array | slice]]:
        """Each slot of the step with its rows."""
        if len(self.slots) == 1:
            return [(int(self.slots[0]), slice(1))]
        # np.unique would import numpy.ma, which takes longer than a token.
        return [(slot, np.flatnonzero(self.slots == slot)) for slot in sorted(set(self.slots.tolist()))]
