"""Ids -> ids: prefill in chunks, decode, and reuse of what a slot's cache already holds. Knows no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgellm.arrays import F32
from edgellm.backends import Backend
from edgellm.errors import ArgumentError, ContextOverflowError
from edgellm.sampling import Sampler
from edgellm.step import Step


class Slot:
    """One slot of a backend and the tokens it holds."""

    def __init__(self, backend: Backend, context_length: int) -> None:
        self._backend, self.context_length = backend, context_length
        self._slot = backend.open_slot()
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
        kept = self._backend.trim(self._slot, self.common(ids))
        del self.ids[kept:]
        return kept

    def extend(self, ids: Sequence[int], wanted: range | None = None) -> F32:
        """Evaluate more tokens in chunks: -> (len(wanted), vocab_size) logits, by default (1, ...) of the last token.

        `wanted` counts from the first of `ids`, in steps of 1. An exception, Ctrl-C included, leaves the slot with the
        chunks that were evaluated.
        """
        wanted = range(len(ids) - 1, len(ids)) if wanted is None else wanted
        found = []
        for start in range(0, len(ids), self._backend.MAX_ROWS):
            chunk = ids[start : start + self._backend.MAX_ROWS]
            first, stop = (min(max(at - start, 0), len(chunk)) for at in (wanted.start, wanted.stop))
            found.append(self._run(chunk, range(first, stop)))
        return np.concatenate(found)

    def _run(self, chunk: Sequence[int], wanted: range) -> F32:
        held = len(self.ids)
        self.check_room(held + len(chunk))
        try:
            logits = self._backend.run(Step.chunk(self._slot, held, chunk, wanted))
        except BaseException:
            del self.ids[self._backend.trim(self._slot, held) :]
            raise
        self.ids.extend(chunk)
        return logits

    def check_room(self, length: int, what: str = "the text") -> None:
        """Raise ContextOverflowError unless `length` tokens fit."""
        if length > self.context_length:
            raise ContextOverflowError(
                f"{what} needs {length} tokens, but the context holds {self.context_length}; "
                f"shorten it or load the model with a larger context"
            )

    def close(self) -> None:
        self._backend.close_slot(self._slot)


def generate(slot: Slot, prompt: Sequence[int], sampler: Sampler, max_tokens: int | None) -> Iterator[int]:
    """The tokens that follow `prompt`, until `max_tokens` or the context is full; the caller stops earlier if it wants.

    The prefix that the slot's cache shares with `prompt` is not evaluated again. Raises ContextOverflowError before
    anything is evaluated when prompt and max_tokens do not fit, ArgumentError for an empty prompt.
    """
    if not prompt:
        raise ArgumentError("the prompt has no tokens, and this model has no BOS token to begin with; give some text")
    if max_tokens is not None and max_tokens < 0:
        raise ArgumentError(f"max_tokens is {max_tokens}; expected 0 or more")
    slot.check_room(len(prompt) + (max_tokens or 0), f"a prompt of {len(prompt)} tokens with {max_tokens or 0} more")
    logits = slot.extend(prompt[slot.reuse(prompt) :])
    room = slot.context_length - len(prompt)
    for left in range(room if max_tokens is None else max_tokens, 0, -1):
        id = sampler(logits[-1], slot.ids)
        yield id
        if left > 1:
            logits = slot.extend([id])
