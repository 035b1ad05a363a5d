"""How likely a text is after each of several others: of short ones in one step. Knows ids, and no text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np

from edgellm.arrays import F32
from edgellm.embedding import opened
from edgellm.generate import Slot, evaluate
from edgellm.logprobs import logprob

Steps = Generator[list[float], None, None]


class Following(NamedTuple):
    ids: list[int]
    n_before: int
    """Ids that the text follows, at least one of them."""

    @property
    def wanted(self) -> range:
        """The rows of which the text's tokens come."""
        return range(self.n_before - 1, len(self.ids) - 1)

    def logprobs(self, logits: F32, n_known: int) -> list[float]:
        """(rows, vocab_size) logits of wanted rows, from the `n_known`th on."""
        ids = self.ids[self.n_before + n_known :]
        return [logprob(row, id, 0).logprob for row, id in zip(logits, ids, strict=False)]


def likelihoods(open_slot: Callable[[], Slot], group: Sequence[Following]) -> Steps:
    """After each step of the model those that are complete: the mean of the natural logarithms of the probabilities of
    the text's tokens. They are the same in any group. Closing it early lets go of the slots."""
    with opened(open_slot, len(group)) as slots:
        if len(group) == 1:
            yield from _alone(slots[0], group[0])
        else:
            parts = [(slot, each.ids, each.wanted) for slot, each in zip(slots, group, strict=True)]
            logits = evaluate(parts, slots[0].backend.run)
            ends = np.cumsum([len(each.wanted) for each in group])
            found = zip(group, np.split(logits, ends[:-1]), strict=True)
            yield [_mean(each.logprobs(rows, 0)) for each, rows in found]


def _alone(slot: Slot, given: Following) -> Steps:
    found: list[float] = []
    for begin in range(0, len(given.ids), slot.max_rows):
        chunk = given.ids[begin : begin + slot.max_rows]
        first, stop = (min(max(at - begin, 0), len(chunk)) for at in (given.wanted.start, given.wanted.stop))
        found += given.logprobs(slot.extend(chunk, wanted=range(first, stop)), len(found))
        yield [] if begin + len(chunk) < len(given.ids) else [_mean(found)]


def _mean(logprobs: list[float]) -> float:
    return sum(logprobs) / len(logprobs)
