"""Ids -> ids: prefill in chunks, decode, check drafts, reuse what a slot's cache already holds. Knows no text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from edgellm.adapter import Adapter
from edgellm.arrays import F32, Array
from edgellm.backends import Backend
from edgellm.banned import Banned
from edgellm.errors import ContextOverflowError
from edgellm.lookup import Lookup
from edgellm.overflow import Window
from edgellm.sampling import Chooser, check_count
from edgellm.sequence import Sequence as Tokens
from edgellm.step import Step


class Slot:
    """One slot of a backend and the tokens it holds."""

    def __init__(self, backend: Backend, context_length: int, adapter: Adapter | None = None) -> None:
        self.backend, self.context_length = backend, context_length
        self.adapter = adapter
        """With which its tokens are evaluated."""
        self.number = backend.open_slot()
        self.max_rows = backend.MAX_ROWS
        """Most tokens of one step. A window's ring has room for as many besides, so they can be taken back."""
        self.ids: list[int] = []
        self._most_held = 0
        self._moved_from: int | None = None
        """The first of the tokens that have moved up: they are not what an evaluation of `ids` would give."""

    @property
    def n_bytes(self) -> int:
        """Memory that it has taken so far."""
        return self.backend.bytes_of(self._most_held)

    def use(self, adapter: Adapter | None) -> None:
        """Evaluate tokens with that adapter; what was evaluated with another one is forgotten."""
        if adapter is not self.adapter:
            self.trim(0)
            self.adapter = adapter

    def common(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be evaluated: the common prefix, short of the last one."""
        n = common(self.ids, ids[:-1])
        return n if self._moved_from is None else min(n, self._moved_from)

    def known(self, ids: Sequence[int]) -> int:
        """How many tokens `reuse` would leave."""
        return self.backend.kept(self.number, self.common(ids))

    def reuse(self, ids: Sequence[int]) -> int:
        """Forget what is not a prefix of `ids`; return how many of them are left in the cache."""
        return self.trim(self.common(ids))

    def trim(self, length: int) -> int:
        """Forget all but the first `length` tokens, or all if the backend cannot; return how many are left."""
        kept = self.backend.trim(self.number, length)
        del self.ids[kept:]
        if self._moved_from is not None and kept <= self._moved_from:
            self._moved_from = None
        return kept

    def trim_past(self, sequence: Tokens) -> None:
        """Forget what was evaluated beyond the tokens before the last: a draft that was wrong."""
        length = len(sequence.ids) - sequence.n_dropped
        if len(self.ids) >= length:
            self.trim(length - 1)

    def room(self, sequence: Tokens) -> int:
        """How many tokens of a sequence the next step may have. Where there is no room for any, some that its window
        leaves out are dropped, and the later ones move up."""
        if sequence.window and len(self.ids) == self.context_length:
            self.drop(sequence.window.n_first, sequence.window.surplus(len(self.ids)))
            sequence.window.dropped += self.context_length - len(self.ids)
        return min(self.max_rows, self.context_length - len(self.ids))

    def drop(self, first: int, count: int) -> None:
        """Forget some tokens amidst the others, which stay as they are, but for their positions. An exception leaves
        the slot empty."""
        try:
            self.backend.drop(self.number, first, count)
        except BaseException:
            self.trim(0)
            raise
        del self.ids[first : first + count]
        self._moved_from = first if self._moved_from is None else min(first, self._moved_from)

    def forget_moved(self) -> None:
        """Hold what an evaluation gives, and no more: what others may go on from."""
        if self._moved_from is not None:
            self.trim(self._moved_from)

    def copy(self, other: Slot, length: int) -> int:
        """Hold the first `length` tokens of another slot in place of one's own, or none if it has lost some of them;
        return how many are held."""
        kept = self.backend.copy(other.number, self.number, length)
        self.ids, self.adapter = [], other.adapter
        is_moved = other._moved_from is not None and kept > other._moved_from
        self._moved_from = other._moved_from if is_moved else None
        self.hold(other.ids[:kept])
        return kept

    def hold(self, ids: Sequence[int]) -> None:
        """Note tokens that the backend holds for this slot, besides those before."""
        self.ids.extend(ids)
        self._most_held = max(self._most_held, len(self.ids))

    def extend(self, ids: Sequence[int], wanted: range | None = None) -> F32:
        """Evaluate more tokens in chunks: -> (len(wanted), vocab_size) logits, by default (1, ...) of the last token.

        `wanted` counts from the first of `ids`, in steps of 1. An exception, Ctrl-C included, leaves the slot with the
        chunks that were evaluated.
        """
        return self._evaluate(ids, wanted, self.backend.run)

    def best(self, ids: Sequence[int], wanted: range | None = None) -> list[int]:
        """As `extend`, without the logits: the best token after each wanted one, -1 if a logit is not a number."""
        found: list[int] = self._evaluate(ids, wanted, self.backend.best).tolist()
        return found

    def hidden(self, ids: Sequence[int]) -> F32:
        """As `extend`, but what logits are computed from: -> (len(ids), hidden_size)."""
        return self._evaluate(ids, range(0), self.backend.hidden)

    def _evaluate(self, ids: Sequence[int], wanted: range | None, run: Callable[[Step], Array]) -> Array:
        wanted = range(len(ids) - 1, len(ids)) if wanted is None else wanted
        found = []
        for start in range(0, len(ids), self.max_rows):
            chunk = ids[start : start + self.max_rows]
            first, stop = (min(max(at - start, 0), len(chunk)) for at in (wanted.start, wanted.stop))
            found.append(evaluate([(self, chunk, range(first, stop))], run))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def close(self) -> None:
        self.backend.close_slot(self.number)


def common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many first tokens are the same."""
    some, others = list(some), list(others)
    known, most = 0, min(len(some), len(others))
    while known < most:  # lists are compared at once, a long history in microseconds
        middle = (known + most + 1) // 2
        if some[known:middle] == others[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


def evaluate(parts: Sequence[tuple[Slot, Sequence[int], range]], run: Callable[[Step], Array]) -> Array:
    """Evaluate more tokens of some slots with one adapter in one step of a backend, `run` or `best`: what it gives for
    the rows wanted, which count from the first of each slot. An exception leaves the slots as they were."""
    for slot, ids, _ in parts:
        check_room(len(slot.ids) + len(ids), 0, slot.context_length)
    try:
        chunks = [Step.chunk(slot.number, len(slot.ids), ids, wanted, slot.adapter) for slot, ids, wanted in parts]
        found = run(Step.join(chunks))
    except BaseException:
        for slot, _, _ in parts:
            slot.trim(len(slot.ids))
        raise
    for slot, ids, _ in parts:
        slot.hold(ids)
    return found


def check_room(n_prompt: int, max_tokens: int, context_length: int) -> None:
    """Raise ContextOverflowError unless a prompt and the tokens asked for fit."""
    if n_prompt + max_tokens > context_length:
        more = f" and {max_tokens} more" if max_tokens else ""
        raise ContextOverflowError(
            f"{n_prompt} tokens{more} do not fit: the context holds {context_length}; shorten the text, ask for fewer "
            f"tokens, load the model with a larger context, or let the oldest go (overflow: shift or window)"
        )


def generate(
    slot: Slot,
    prompt: Sequence[int],
    sampler: Chooser,
    max_tokens: int | None,
    lookup: Lookup | None = None,
    *,
    ends: Collection[int] = (),
    banned: Banned | None = None,
    window: Window | None = None,
    kind: Callable[..., Tokens] = Tokens,
) -> Iterator[int]:
    """The tokens that follow `prompt`, until one of `ends` comes, the sampler is done, `max_tokens` or the context is
    full; the caller stops earlier if it wants. With a window no context is ever full, but some tokens are dropped.

    `prompt` has at least one token; the prefix that the slot's cache shares with it is not evaluated again. A lookup's
    drafts change no token, only how many a step gives. Raises ContextOverflowError, before anything is evaluated, when
    prompt and max_tokens do not fit.
    """
    left = most_new(len(prompt), max_tokens, slot.context_length, window)
    sequence = kind(list(prompt), sampler, left, ends=ends, lookup=lookup, banned=banned, window=window)
    slot.reuse(sequence.reusable)
    while sequence.finish_reason is None:
        room = slot.room(sequence)
        rows, n_wanted = sequence.rows(len(slot.ids) + sequence.n_dropped, room)
        run = slot.backend.best if sequence.takes_best else slot.backend.run
        found = evaluate([(slot, rows, range(len(rows) - n_wanted, len(rows)))], run)
        if n_wanted:
            new = sequence.take(found)
            slot.trim_past(sequence)
            yield from new


def most_new(n_prompt: int, max_tokens: int | None, context_length: int, window: Window | None = None) -> int:
    """How many tokens may follow a prompt; raises ContextOverflowError if those asked for do not fit, ArgumentError
    for what is no number of tokens."""
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
    check_room(n_prompt, max_tokens or 0 if window is None else 0, context_length)
    if max_tokens is not None:
        return max_tokens
    return sys.maxsize if window else context_length - n_prompt
