"""Ids that are being continued: what of them is evaluated next, and what follows. Knows no text, and no slot."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from edgellm import samplers
from edgellm.adapter import Adapter
from edgellm.arrays import Array
from edgellm.banned import Banned
from edgellm.errors import ArgumentError
from edgellm.lookup import Lookup
from edgellm.overflow import Window
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
        banned: Banned | None = None,
        adapter: Adapter | None = None,
        window: Window | None = None,
    ) -> None:
        self.ids, self.n_prompt = list(prompt), len(prompt)
        self.sampler, self.left = sampler, left
        """Most tokens that are still to come."""
        self.finish_reason: str | None = "length" if left == 0 else None
        """"stop": the last token is one of `ends`, or nothing can follow it; "length": no more may come; None: it goes
        on. A scheduler says "cancelled", or "error" for what its sampler raised."""
        self.error: Exception | None = None
        self.adapter = adapter
        self.n_cached = 0
        """Tokens of the prompt that a cache held already."""
        self.window = window
        """Which tokens a slot drops when it is full; None: it is never filled."""
        self._ends, self._lookup, self._draft = ends, lookup, list[int]()
        self._banned, self._n_given = banned, len(prompt)

    @property
    def reusable(self) -> list[int]:
        """The ids of which a cache may hold all but the last."""
        return self.ids

    @property
    def n_dropped(self) -> int:
        """Of its ids, those after the first that its slot has dropped."""
        return self.window.dropped if self.window else 0

    @property
    def takes_best(self) -> bool:
        """The best tokens of the rows suffice; their logits need not be known."""
        return self.sampler.takes_best and not self._excluded()

    def rows(self, held: int, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens to evaluate after the first `held`, dropped ones included, and for how many of the last
        of them it is wanted what follows: none, while the prompt is not at its end."""
        pending = self.ids[held : held + most]
        if held + len(pending) < len(self.ids):
            return pending, 0
        if self._lookup and len(self.ids) > self.n_prompt:
            self._draft = self._lookup.draft(self.ids, min(self.left - 1, most - len(pending)))
        return [*pending, *self._draft], len(self._draft) + 1

    def take(self, found: Array) -> list[int]:
        """What was found for the rows that were wanted, logits or best tokens -> the ids that follow: the draft as far
        as it is right, and one token more. Those that may be the beginning of a banned string come later, or never."""
        new: list[int] = []
        for id, drafted in zip(self._choices(found), [*self._draft, None], strict=True):
            new.append(id)
            self.ids.append(id)
            self.left -= 1
            if self._went_back():
                break
            if id in self._ends or self.sampler.is_done:
                self.finish_reason = "stop"
            elif not self.left:
                self.finish_reason = "length"
            if id != drafted or self.finish_reason:
                break
        if self._lookup:
            self._lookup.count(self._draft, new)
        return self._certain()

    def _choices(self, found: Array) -> Iterator[int]:
        """One by one, as `ids` grows."""
        if found.dtype == np.int32:
            return map(checked, found.tolist())
        return (self.sampler(self._allowed(logits), self.ids) for logits in found)

    def _allowed(self, logits: Array) -> Array:
        excluded = self._excluded()
        return samplers.logit_bias(logits, dict.fromkeys(excluded, -np.inf)) if excluded else logits

    def _excluded(self) -> set[int]:
        return self._banned.excluded(len(self.ids) - self.n_prompt) if self._banned else set()

    def _went_back(self) -> bool:
        """Whether a banned string is complete; then it is gone, and the answer goes on from where it began."""
        if not self._banned:
            return False
        answer = self.ids[self.n_prompt :]
        said = answer[:-1] if answer[-1] in self._ends else answer
        kept = self._banned.review(said)
        if kept == len(said):
            return False
        if self.window and self.n_prompt + kept <= self.window.n_first + self.n_dropped:
            raise ArgumentError(
                "a banned string began in tokens that the context has dropped; expected it in those that stay: ban a "
                "shorter one, or load the model with a larger context"
            )
        del self.ids[self.n_prompt + kept :]
        self.left += len(answer) - kept
        self.sampler.rewind(len(answer) - kept)
        if self._lookup:
            self._lookup.restart()
        return True

    def _certain(self) -> list[int]:
        """The ids that are new, and stay."""
        n = len(self.ids) if not self._banned or self.finish_reason else self.n_prompt + self._banned.settled()
        certain = self.ids[self._n_given : n]
        self._n_given = n
        return certain
