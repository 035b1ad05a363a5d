"""Ids -> ids: prefill in chunks, decode, check drafts, reuse what a slot's cache already holds. Knows no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from edgellm.arrays import F32, I32
from edgellm.backends import Backend
from edgellm.errors import ArgumentError, ContextOverflowError
from edgellm.lookup import Lookup
from edgellm.samplers import checked
from edgellm.sampling import Sampler
from edgellm.step import Step

Rows = TypeVar("Rows", F32, I32)


class Slot:
    """One slot of a backend and the tokens it holds."""

    def __init__(self, backend: Backend, context_length: int) -> None:
        self._backend, self.context_length = backend, context_length
        self._slot = backend.open_slot()
        self.max_rows = backend.MAX_ROWS
        """Most tokens of one step. A window's ring has room for as many besides, so they can be taken back."""
        self.ids: list[int] = []

    def common(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be evaluated: the common prefix, short of the last one."""
        length = 0
        for held, new in zip(self.ids, ids[:-1], strict=False):
            if held != new:
                break
            length += 1
        return length

    def reuse(self, ids: Sequence[int]) -> int:
        """Forget what is not a prefix of `ids`; return how many of them are left in the cache."""
        return self.trim(self.common(ids))

    def trim(self, length: int) -> int:
        """Forget all but the first `length` tokens, or all if the backend cannot; return how many are left."""
        kept = self._backend.trim(self._slot, length)
        del self.ids[kept:]
        return kept

    def extend(self, ids: Sequence[int], wanted: range | None = None) -> F32:
        """Evaluate more tokens in chunks: -> (len(wanted), vocab_size) logits, by default (1, ...) of the last token.

        `wanted` counts from the first of `ids`, in steps of 1. An exception, Ctrl-C included, leaves the slot with the
        chunks that were evaluated.
        """
        return self._evaluate(ids, wanted, self._backend.run)

    def best(self, ids: Sequence[int], wanted: range | None = None) -> list[int]:
        """As `extend`, without the logits: the best token after each wanted one, -1 if a logit is not a number."""
        found: list[int] = self._evaluate(ids, wanted, self._backend.best).tolist()
        return found

    def _evaluate(self, ids: Sequence[int], wanted: range | None, run: Callable[[Step], Rows]) -> Rows:
        wanted = range(len(ids) - 1, len(ids)) if wanted is None else wanted
        found = []
        for start in range(0, len(ids), self._backend.MAX_ROWS):
            chunk = ids[start : start + self._backend.MAX_ROWS]
            first, stop = (min(max(at - start, 0), len(chunk)) for at in (wanted.start, wanted.stop))
            found.append(self._run(chunk, range(first, stop), run))
        return np.concatenate(found)

    def _run(self, chunk: Sequence[int], wanted: range, run: Callable[[Step], Rows]) -> Rows:
        held = len(self.ids)
        check_room(held + len(chunk), 0, self.context_length)
        try:
            found = run(Step.chunk(self._slot, held, chunk, wanted))
        except BaseException:
            del self.ids[self._backend.trim(self._slot, held) :]
            raise
        self.ids.extend(chunk)
        return found

    def close(self) -> None:
        self._backend.close_slot(self._slot)


def check_room(n_prompt: int, max_tokens: int, context_length: int) -> None:
    """Raise ContextOverflowError unless a prompt and the tokens asked for fit, ArgumentError for numbers below 0."""
    if max_tokens < 0:
        raise ArgumentError(f"max_tokens is {max_tokens}; expected 0 or more")
    if n_prompt + max_tokens > context_length:
        more = f" and {max_tokens} more" if max_tokens else ""
        raise ContextOverflowError(
            f"{n_prompt} tokens{more} do not fit: the context holds {context_length}; shorten the text, ask for fewer "
            f"tokens, or load the model with a larger context"
        )


def generate(
    slot: Slot, prompt: Sequence[int], sampler: Sampler, max_tokens: int | None, lookup: Lookup | None = None
) -> Iterator[int]:
    """The tokens that follow `prompt`, until `max_tokens` or the context is full; the caller stops earlier if it wants.

    `prompt` has at least one token; the prefix that the slot's cache shares with it is not evaluated again. A lookup's
    drafts change no token, only how many a step gives. Raises ContextOverflowError, before anything is evaluated, when
    prompt and max_tokens do not fit.
    """
    check_room(len(prompt), max_tokens or 0, slot.context_length)
    left = slot.context_length - len(prompt) if max_tokens is None else max_tokens
    slot.reuse(prompt)
    ids = list(prompt)
    new = _follow(slot, ids, [], sampler)
    while left > 0:
        yield from new
        left -= len(new)
        if left > 0:
            draft = lookup.draft(ids, min(left, slot.max_rows) - 1) if lookup else []
            new = _follow(slot, ids, draft, sampler)
            if lookup:
                lookup.count(draft, new)


def _follow(slot: Slot, ids: list[int], draft: list[int], sampler: Sampler) -> list[int]:
    """Evaluate what the slot has not of `ids`, and a draft of more, in one step: append to `ids`, and return, the draft
    as far as it is what follows, and one token more."""
    n_known, rows = len(ids), [*ids[len(slot.ids) :], *draft]
    wanted = range(len(rows) - len(draft) - 1, len(rows))
    choices: Iterator[int]
    if sampler.takes_best:
        choices = map(checked, slot.best(rows, wanted))
    else:  # one by one, as `ids` grows
        choices = (sampler(logits, ids) for logits in slot.extend(rows, wanted))
    for id, drafted in zip(choices, [*draft, None], strict=True):
        ids.append(id)
        if id != drafted:
            break
    if draft:
        slot.trim(len(ids) - 1)
    return ids[n_known:]
