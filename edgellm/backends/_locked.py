"""A backend for several threads."""

from __future__ import annotations

import threading

from edgellm.adapter import Adapter
from edgellm.arrays import F32, I32, Array
from edgellm.backends import Backend
from edgellm.errors import EdgeError
from edgellm.footprint import Footprint
from edgellm.step import Step


class Locked:
    """A backend that several threads may call: one call at a time. After `close` a call raises EdgeError."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._lock, self._is_closed = backend, threading.RLock(), False
        self.MAX_ROWS, self.CACHE_LAYOUT, self.bytes_of = backend.MAX_ROWS, backend.CACHE_LAYOUT, backend.bytes_of

    @property
    def footprint(self) -> Footprint:
        with self._lock:
            return self._backend.footprint

    def adapt(self, adapter: Adapter) -> None:
        with self._lock:
            self._open.adapt(adapter)

    def run(self, step: Step) -> F32:
        with self._lock:
            return self._open.run(step)

    def best(self, step: Step) -> I32:
        with self._lock:
            return self._open.best(step)

    def hidden(self, step: Step) -> F32:
        with self._lock:
            return self._open.hidden(step)

    def open_slot(self) -> int:
        with self._lock:
            return self._open.open_slot()

    def close_slot(self, slot: int) -> None:
        with self._lock:
            self._backend.close_slot(slot)

    def trim(self, slot: int, length: int) -> int:
        with self._lock:
            # What ended with the backend has nothing left to lose, and tells why it ended.
            return 0 if self._is_closed else self._backend.trim(slot, length)

    def copy(self, source: int, target: int, length: int) -> int:
        with self._lock:
            return self._open.copy(source, target, length)

    def kept(self, slot: int, length: int) -> int:
        with self._lock:
            return self._open.kept(slot, length)

    def drop(self, slot: int, first: int, count: int) -> None:
        with self._lock:
            self._open.drop(slot, first, count)

    def least_latest(self) -> int:
        with self._lock:
            return self._open.least_latest()

    def content(self, slot: int) -> tuple[int, list[Array]]:
        with self._lock:
            return self._open.content(slot)

    def restore(self, slot: int, length: int, written: int) -> list[Array]:
        with self._lock:
            return self._open.restore(slot, length, written)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._backend.close()

    @property
    def _open(self) -> Backend:
        if self._is_closed:
            raise EdgeError("the model is closed; load it again")
        return self._backend
