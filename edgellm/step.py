"""One run of a model: rows of (token, slot, position), in any mixture of prompt chunks and decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

    def by_slot(self) -> Iterator[tuple[int, Array]]:
        """Each slot of the step with the indices of its rows."""
        for slot in np.unique(self.slots):
            yield int(slot), np.flatnonzero(self.slots == slot)
