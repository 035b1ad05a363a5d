"""Many sequences at once: in each step of the backend, prompt chunks and decodes of all that are under way.

Knows ids alone: no text, no threads. It is for one thread; steps of others on the same backend may come between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from edgellm.adapter import Adapter
from edgellm.arrays import Array
from edgellm.backends import Backend
from edgellm.banned import Banned
from edgellm.errors import ArgumentError
from edgellm.generate import Slot, common, evaluate, most_new
from edgellm.lookup import Lookup
from edgellm.overflow import Window
from edgellm.prefix_cache import PrefixCache
from edgellm.sampling import Chooser
from edgellm.sequence import Sequence

WORTH_WAITING = 16
"""Tokens of a prompt that another sequence is evaluating too: then it is waited for, and its cache copied."""
AT_ONCE = 16
"""Sequences in a step, if nobody says how many."""


class Progress(NamedTuple):
    """What a step brought to a sequence."""

    sequence: Sequence
    ids: list[int]
    """The tokens that are new, the one that ends it included."""
    finish_reason: str | None
    """"stop", "length", "error" (see `Sequence.error`), or None: it goes on."""


class Scheduler:
    """Sequences under way, each in a slot of its own, and those that wait for one."""

    def __init__(
        self, backend: Backend, context_length: int, most_at_once: int = AT_ONCE, cache: PrefixCache | None = None
    ) -> None:
        """`cache` has what earlier sequences left, and gets what these leave; without one it is gone at `close`."""
        if not 1 <= most_at_once <= backend.MAX_ROWS:
            raise ArgumentError(f"{most_at_once} sequences at once; expected 1 to {backend.MAX_ROWS}")
        self._backend, self._context_length, self._most_at_once = backend, context_length, most_at_once
        self._waiting: deque[Sequence] = deque()
        self._slots: dict[Sequence, Slot] = {}
        self._turns: list[Adapter | None] = []
        """Of the adapters under way; the last one's step is the longest ago."""
        self._is_own_cache = cache is None
        self._cache = cache or PrefixCache(backend, context_length)

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._slots)

    def submit(
        self,
        ids: list[int],
        sampler: Chooser,
        max_tokens: int | None = None,
        *,
        ends: Collection[int] = (),
        lookup: Lookup | None = None,
        banned: Banned | None = None,
        adapter: Adapter | None = None,
        window: Window | None = None,
        kind: Callable[..., Sequence] = Sequence,
    ) -> Sequence:
        """Let a sequence of at least one id go on, as soon as there is room; raises ContextOverflowError.

        Its tokens are those that it would have alone. A prefix that it shares with another sequence is evaluated once.
        """
        left = most_new(len(ids), max_tokens, self._context_length, window)
        sequence = kind(ids, sampler, left, ends=ends, lookup=lookup, banned=banned, adapter=adapter, window=window)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop a sequence that waits or is under way; what it has so far stays in it."""
        sequence.finish_reason = sequence.finish_reason or "cancelled"
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._retire(sequence)

    def step(self) -> list[Progress]:
        """Run the backend once: every sequence that is past its prompt gets a token or more, the others a chunk. Those
        with another adapter wait for their turn.

        An exception, Ctrl-C included, leaves all sequences as they were before.
        """
        done = list(self._admit())
        shares = list(self._share())
        if not shares:
            return done
        parts = [(self._slots[sequence], rows, range(len(rows) - n, len(rows))) for sequence, rows, n in shares]
        best = all(sequence.takes_best for sequence, _, n_wanted in shares if n_wanted)
        found = evaluate(parts, self._backend.best if best else self._backend.run)
        wanted = [(sequence, n_wanted) for sequence, _, n_wanted in shares if n_wanted]
        return [*done, *self._take(wanted, found)]

    def settle(self) -> None:
        """Give back the memory of short idle slots but the last one, whose sequence may go on soon."""
        self._cache.settle()

    def close(self) -> None:
        """Leave the slots to the cache, or close one's own; what is not at its end is not reported any more."""
        for sequence in list(self._slots):
            self._retire(sequence)
        self._waiting.clear()
        if self._is_own_cache:
            self._cache.close()
        else:
            self.settle()

    def _admit(self) -> Iterator[Progress]:
        """Give a slot to those that wait, the first first; some are at their end before they begin."""
        for sequence in list(self._waiting):
            if sequence.finish_reason:
                self._waiting.remove(sequence)
                yield Progress(sequence, [], sequence.finish_reason)
            elif len(self._slots) == self._most_at_once:
                return
            elif not self._awaits_prefix(sequence):
                self._slots[sequence] = self._slot_with_prefix(sequence)
                self._waiting.remove(sequence)

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Whether much of its prompt is just being evaluated for another one."""
        slots = self._slots_with(sequence.adapter)
        whole = (other for other in slots if not other.n_dropped)
        alike = {other: common(other.ids[:-1], sequence.reusable[:-1]) for other in whole}
        source = max(alike, key=alike.__getitem__, default=None)
        if source is None or slots[source].common(sequence.reusable) == alike[source]:
            return False
        others = (slot.common(sequence.reusable) for each, slot in slots.items() if each is not source)
        return alike[source] - max(*others, self._cache.known(sequence.reusable, sequence.adapter), 0) >= WORTH_WAITING

    def _slot_with_prefix(self, sequence: Sequence) -> Slot:
        """A slot of the cache, or a copy of what another sequence shares."""
        slot = self._cache.take(sequence.reusable, adapter=sequence.adapter)
        slots = self._slots_with(sequence.adapter).values()
        other = max(slots, key=lambda slot: slot.known(sequence.reusable), default=slot)
        if other.known(sequence.reusable) > len(slot.ids):
            try:
                slot.copy(other, other.known(sequence.reusable))
            except BaseException:
                slot.close()
                raise
        sequence.n_cached = len(slot.ids)
        return slot

    def _share(self) -> Iterator[tuple[Sequence, list[int], int]]:
        """Divide the rows of a step: those that need few get them, the others the same number each."""
        slots = self._slots_with(self._next_adapter())
        order = sorted(slots.items(), key=lambda item: len(item[0].ids) - item[0].n_dropped - len(item[1].ids))
        left = self._backend.MAX_ROWS
        for i, (sequence, slot) in enumerate(order):
            most = min(slot.room(sequence), left // (len(order) - i))
            rows, n_wanted = sequence.rows(len(slot.ids) + sequence.n_dropped, most)
            left -= len(rows)
            yield sequence, rows, n_wanted

    def _slots_with(self, adapter: Adapter | None) -> dict[Sequence, Slot]:
        return {sequence: slot for sequence, slot in self._slots.items() if sequence.adapter is adapter}

    def _next_adapter(self) -> Adapter | None:
        """Whose turn it is: of the one that has waited longest."""
        under_way = dict.fromkeys(sequence.adapter for sequence in self._slots)
        new = [adapter for adapter in under_way if adapter not in self._turns]
        *others, chosen = [*new, *(adapter for adapter in self._turns if adapter in under_way)] or [None]
        self._turns = [chosen, *others]
        return chosen

    def _take(self, wanted: Iterable[tuple[Sequence, int]], found: Array) -> Iterator[Progress]:
        at = 0
        for sequence, n in wanted:
            new: list[int] = []
            try:
                new = sequence.take(found[at : at + n])
            except Exception as error:  # of a logits processor, say, which is anybody's code
                sequence.error, sequence.finish_reason = error, "error"
            at += n
            self._slots[sequence].trim_past(sequence)
            if sequence.finish_reason:
                self._retire(sequence)
            yield Progress(sequence, new, sequence.finish_reason)

    def _retire(self, sequence: Sequence) -> None:
        """Its slot keeps the tokens for others that begin with them."""
        slot = self._slots.pop(sequence, None)
        if slot:
            self._cache.put(slot)
