"""How likely a model finds tokens, those of an answer and those of its prompt. Knows no text."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import Any, NamedTuple

import numpy as np

from edgellm.arrays import F32, Array
from edgellm.samplers import checked
from edgellm.sampling import Chooser
from edgellm.sequence import Sequence


class Logprob(NamedTuple):
    """Of one token: the natural logarithm of its probability, as the model has it, before any sampler.

    Tokens that a banned string excludes count as impossible."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens with theirs, the likeliest first."""


def logprob(logits: F32, id: int, n_top: int) -> Logprob:
    """(tokens,) logits; raises BackendError if they are not numbers."""
    best = int(logits.argmax())
    checked(-1 if np.isnan(logits[best]) else best)
    total = float(logits[best]) + np.log(np.exp(logits - logits[best]).sum(dtype=np.float64))
    likelihood = float(logits[id] - total)
    if not n_top:
        return Logprob(id, likelihood, [])
    top = np.argpartition(-logits, min(n_top, len(logits) - 1))[:n_top]
    top = top[np.lexsort((top, -logits[top]))]
    return Logprob(id, likelihood, [(int(each), float(logits[each] - total)) for each in top])


class Recorder:
    """A sampler whose choices are noted."""

    takes_best = False

    def __init__(self, sampler: Chooser, n_top: int, found: list[Logprob]) -> None:
        """What is found goes into `found`, one for each token."""
        self._sampler, self._n_top, self._found = sampler, n_top, found

    def __call__(self, logits: F32, ids: Ids[int]) -> int:
        id = self._sampler(logits, ids)
        self._found.append(logprob(logits, id, self._n_top))
        return id

    def rewind(self, n: int) -> None:
        del self._found[len(self._found) - n :]
        self._sampler.rewind(n)

    @property
    def is_done(self) -> bool:
        return self._sampler.is_done


class Scored(Sequence):
    """A sequence that notes how likely its prompt was: so all of it is evaluated, whatever a cache holds."""

    def __init__(self, *arguments: Any, n_top: int, found: list[Logprob], **options: Any) -> None:
        """Takes what Sequence takes. What is found goes into `found`, one for each token but the first."""
        super().__init__(*arguments, **options)
        self._n_top, self._found, self._first = n_top, found, 0
        if self.n_prompt > 1:
            self.finish_reason = None

    @property
    def reusable(self) -> list[int]:
        return self.ids[:1]

    @property
    def takes_best(self) -> bool:
        return len(self.ids) > self.n_prompt and super().takes_best

    def rows(self, held: int, most: int) -> tuple[list[int], int]:
        self._first = held
        pending, n_wanted = super().rows(held, most)
        return pending, len(pending) if held < self.n_prompt else n_wanted

    def take(self, found: Array) -> list[int]:
        targets = self.ids[self._first + 1 : self._first + 1 + len(found)] if self._first < self.n_prompt else []
        self._found += [logprob(row, id, self._n_top) for row, id in zip(found, targets, strict=False)]
        rest = found[len(targets) :]
        if not len(rest):
            return []
        if not self.left:
            self.finish_reason = "length"
            return []
        return super().take(rest)
