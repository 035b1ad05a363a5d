"""Ids that are being continued: what of them is evaluated next, and what follows. Knows no text, and no slot."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from edgellm.arrays import Array
from edgellm.errors import EdgeError
from edgellm.lookup import Lookup
from edgellm.samplers import checked
from edgellm.sampling import Chooser


class Sequence:
    """A prompt and what comes after it. A lookup's drafts change no token, only how many a step gives."""

    def __init__(
        self,
        prompt: list[int],
        sampler: Chooser,
        left: int,
        *,
        ends: Collection[int] = (),
        lookup: Lookup | None = None,
    ) -> None:
        self.ids, self.n_prompt = list(prompt), len(prompt)
        self.sampler, self.left = sampler, left
        """Most tokens that are still to come."""
        self.finish_reason: str | None = "length" if left == 0 else None
        """"stop": the last token is one of `ends`, or nothing can follow it; "length": no more may come; None: it goes
        on. A scheduler says "cancelled", or "error" for what its sampler raised."""
        self.error: EdgeError | None = None
        self.n_cached = 0
        """Tokens of the prompt that a cache held already."""
        self._ends, self._lookup, self._draft = ends, lookup, list[int]()

    @property
    def takes_best(self) -> bool:
        """The best tokens of the rows suffice; their logits need not be known."""
        return self.sampler.takes_best

    def rows(self, held: int, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens to evaluate after the first `held`, and for how many of the last of them it is wanted
        what follows: none, while the prompt is not at its end."""
        pending = self.ids[held : held + most]
        if held + len(pending) < len(self.ids):
            return pending, 0
        if self._lookup and len(self.ids) > self.n_prompt:
            self._draft = self._lookup.draft(self.ids, min(self.left - 1, most - len(pending)))
        return [*pending, *self._draft], len(self._draft) + 1

    def take(self, found: Array) -> list[int]:
        """What was found for the rows that were wanted, logits or best tokens -> the ids that follow: the draft as far
        as it is right, and one token more."""
        n_known = len(self.ids)
        for id, drafted in zip(self._choices(found), [*self._draft, None], strict=True):
            self.ids.append(id)
            if id != drafted or id in self._ends or self.sampler.is_done:
                break
        new = self.ids[n_known:]
        self.left -= len(new)
        if self._lookup:
            self._lookup.count(self._draft, new)
        if new[-1] in self._ends or self.sampler.is_done:
            self.finish_reason = "stop"
        elif self.left == 0:
            self.finish_reason = "length"
        return new

    def _choices(self, found: Array) -> Iterator[int]:
        """One by one, as `ids` grows."""
        if found.dtype == np.int32:
            return map(checked, found.tolist())
        return (self.sampler(logits, self.ids) for logits in found)
