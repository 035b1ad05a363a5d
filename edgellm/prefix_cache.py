"""Slots at rest, by the tokens they hold: what a prompt has in common with one of them is not evaluated again.

Any number of threads may use it. A slot is either in here or with the one who took it, and never changes in here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgellm.adapter import Adapter
from edgellm.backends import Backend
from edgellm.generate import Slot

MOST_SLOTS = 16
"""A slot reserves addresses for a full context, even if it takes little memory."""
SHORT = 128
"""Fewer tokens than these are soon evaluated again."""
AHEAD = 32
"""Tokens that are evaluated ahead at once: whoever needs the backend meanwhile waits for them."""


@dataclass(eq=False)
class _Entry:
    slot: Slot
    keeper: weakref.ref[object] | None

    def is_kept_by(self, keeper: object) -> bool:
        return keeper is not None and self.keeper is not None and self.keeper() is keeper

    @property
    def is_free(self) -> bool:
        return self.keeper is None or self.keeper() is None

    @property
    def is_short(self) -> bool:
        return len(self.slot.ids) < SHORT


class PrefixCache:
    """Slots without a keeper take at most `most_bytes` of memory together, with the prompt for which one is taken: the
    oldest are closed. A slot with a keeper, such as a Chat, stays as long as that object lives, or until `release`."""

    def __init__(self, backend: Backend, context_length: int, most_bytes: int | None = None) -> None:
        """By default they take no more than one full context, as one slot may anyway."""
        self._backend, self._context_length = backend, context_length
        self._most_bytes = backend.footprint.cache if most_bytes is None else most_bytes
        self._lent = 0
        self._entries: list[_Entry] = []  # the last used first
        self._is_closed = False
        self._lock = threading.RLock()

    @property
    def n_bytes(self) -> int:
        """Memory that the slots in here have taken."""
        with self._lock:
            return sum(entry.slot.n_bytes for entry in self._entries)

    def known(self, ids: Sequence[int], adapter: Adapter | None = None) -> int:
        """How many of these tokens, the last one apart, some slot with that adapter holds."""
        with self._lock:
            return max((entry.slot.known(ids) for entry in self._entries if entry.slot.adapter is adapter), default=0)

    def tokens_of(self, keeper: object = None) -> list[int]:
        """What that keeper's slot holds, without one the slot that was put last; nothing while it is taken."""
        with self._lock:
            found = self._latest(keeper)
            return list(found.slot.ids) if found else []

    def take(self, ids: Sequence[int], keeper: object = None, adapter: Adapter | None = None) -> Slot:
        """A slot for that adapter, which holds as many of these tokens as any such does, short of the last, and no
        others.

        It is the one that holds them, where most of what it has goes on; else what others need stays, and is copied.
        """
        with self._lock:
            alike = [entry for entry in self._entries if entry.slot.adapter is adapter]
            source = max(alike, key=lambda entry: entry.slot.known(ids), default=None)
            n_known = source.slot.known(ids) if source else 0
            if source and (source.is_free or source.is_kept_by(keeper)) and _goes_on(source, n_known):
                slot = self._without(source)
                if source.is_free:
                    self._make_room(len(ids))
            else:
                slot = self._spare(len(ids), keeper, source)
            try:
                slot.use(adapter)
                if source and n_known > slot.known(ids):
                    slot.copy(source.slot, n_known)
                else:
                    slot.reuse(ids)
            except BaseException:
                slot.close()
                raise
            return slot

    def put(self, slot: Slot, keeper: object = None) -> None:
        """Take a slot in, in place of another one of that keeper."""
        slot.forget_moved()
        with self._lock:
            self.release(keeper)
            is_free = keeper is None or self._is_closed
            self._entries.insert(0, _Entry(slot, None if is_free else weakref.ref(keeper)))
            self._tidy()

    def hold(self, ids: Sequence[int], keeper: object, adapter: Adapter | None, stopped: Callable[[], bool]) -> int:
        """Have a slot with that adapter hold these tokens, evaluating those that none does, AHEAD at a time, until
        `stopped` says so; return how many were evaluated."""
        whole = [*ids, 0]  # a prompt's last token is always evaluated
        if self.known(whole, adapter) == len(ids):
            return 0
        slot = self.take(whole, keeper, adapter)
        n_known = len(slot.ids)
        try:
            while len(slot.ids) < len(ids) and not stopped():
                slot.extend(ids[len(slot.ids) : len(slot.ids) + AHEAD], range(0))
            return len(slot.ids) - n_known
        finally:
            self.put(slot, keeper)

    @contextmanager
    def latest(self, keeper: object = None) -> Iterator[Slot | None]:
        """The slot that was put last, or that of the keeper; nobody else has it meanwhile."""
        with self._lock:
            if found := self._latest(keeper):
                self._entries.remove(found)
        try:
            yield found.slot if found else None
        finally:
            if found:
                self.put(found.slot, found.keeper and found.keeper())

    def release(self, keeper: object) -> None:
        """The keeper needs its slot no longer."""
        with self._lock:
            for entry in self._entries:
                if entry.is_kept_by(keeper):
                    entry.keeper = None
            self._tidy()

    @contextmanager
    def lending(self, n_bytes: int) -> Iterator[None]:
        """Keep so much less meanwhile: somebody has slots that are never put in here."""
        with self._lock:
            self._lent += n_bytes
            self._tidy()
        try:
            yield
        finally:
            with self._lock:
                self._lent -= n_bytes

    def settle(self) -> None:
        """Close slots without a keeper that hold few tokens, but the last used."""
        with self._lock:
            for entry in [entry for entry in self._entries if entry.is_free and entry.is_short][1:]:
                self._without(entry).close()

    def close(self) -> None:
        """Close what is in here, and all that is put in later."""
        with self._lock:
            self._is_closed, self._most_bytes = True, -1
            for entry in self._entries:
                entry.keeper = None
            self._tidy()

    def _latest(self, keeper: object) -> _Entry | None:
        return next((entry for entry in self._entries if keeper is None or entry.is_kept_by(keeper)), None)

    def _spare(self, n_tokens: int, keeper: object, but: _Entry | None) -> Slot:
        """The keeper's own slot, or after old ones have made room a short one, or a new one."""
        own = next((entry for entry in self._entries if entry.is_kept_by(keeper)), None)
        if own is None:
            self._make_room(n_tokens, but)
            own = next((entry for entry in self._entries if entry.is_free and entry.is_short), None)
        return self._without(own) if own else Slot(self._backend, self._context_length)

    def _make_room(self, n_tokens: int, but: _Entry | None = None) -> None:
        self._tidy(self._backend.bytes_of(n_tokens), but)

    def _without(self, entry: _Entry) -> Slot:
        self._entries.remove(entry)
        return entry.slot

    def _tidy(self, wanted: int = 0, but: _Entry | None = None) -> None:
        """Close what there is no room for, beside so many bytes that are wanted."""
        most_bytes = self._most_bytes - self._lent - wanted
        for entry in [entry for entry in self._surplus(most_bytes) if entry is not but]:
            self._without(entry).close()

    def _surplus(self, most_bytes: int) -> Iterator[_Entry]:
        """Entries without a keeper that are too many, or too old for all of them to be kept."""
        n_bytes = 0
        for n_before, entry in enumerate(entry for entry in self._entries if entry.is_free):
            n_bytes += entry.slot.n_bytes
            if n_bytes > most_bytes or n_before >= MOST_SLOTS:
                yield entry


def _goes_on(entry: _Entry, n_known: int) -> bool:
    """Whether no more of a slot's tokens get lost than are used."""
    return entry.is_short or 2 * n_known >= len(entry.slot.ids)
