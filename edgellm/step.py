"""One run of a model: rows of (token, slot, position), in any mixture of prompt chunks and decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgellm.arrays import I32, Array


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of one slot are at positions that follow what the slot's cache holds."""

    tokens: I32
    slots: I32
    positions: I32
    wanted: Array
    """Indices of the rows whose logits are computed."""

    @classmethod
    def chunk(cls, slot: int, first: int, tokens: Sequence[int], wanted: Sequence[int] | None = None) -> Step:
        """Consecutive tokens of one slot; by default the logits of the last one are wanted."""
        n = len(tokens)
        return cls(
            np.asarray(tokens, np.int32),
            np.full(n, slot, np.int32),
            np.arange(first, first + n, dtype=np.int32),
            np.asarray([n - 1] if wanted is None else wanted, np.intp),
        )

    @classmethod
    def join(cls, steps: Sequence[Step]) -> Step:
        """The rows of several steps, one after the other; no slot is in two of them."""
        if len(steps) == 1:
            return steps[0]
        starts = np.cumsum([0, *(len(step.tokens) for step in steps[:-1])])
        wanted = [step.wanted + start for step, start in zip(steps, starts, strict=True)]
        columns = ([getattr(step, name) for step in steps] for name in ("tokens", "slots", "positions"))
        tokens, slots, positions = (np.concatenate(column) for column in columns)
        return cls(tokens, slots, positions, np.concatenate(wanted))

    @cached_property
    def by_slot(self) -> list[tuple[int, Array]]:
        """Each slot of the step with the indices of its rows."""
        if len(self.slots) == 1:
            return [(int(self.slots[0]), np.zeros(1, np.intp))]
        # np.unique would import numpy.ma, which takes longer than a token.
        return [(slot, np.flatnonzero(self.slots == slot)) for slot in sorted(set(self.slots.tolist()))]
