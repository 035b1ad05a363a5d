"""A backend for several threads."""

from __future__ import annotations

import threading

from edgellm.arrays import F32, I32
from edgellm.backends import Backend
from edgellm.step import Step


class Locked:
    """A backend that several threads may call: one call at a time."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._lock = backend, threading.RLock()
        self.MAX_ROWS, self.footprint = backend.MAX_ROWS, backend.footprint

    def run(self, step: Step) -> F32:
        with self._lock:
            return self._backend.run(step)

    def best(self, step: Step) -> I32:
        with self._lock:
            return self._backend.best(step)

    def hidden(self, step: Step) -> F32:
        with self._lock:
            return self._backend.hidden(step)

    def open_slot(self) -> int:
        with self._lock:
            return self._backend.open_slot()

    def close_slot(self, slot: int) -> None:
        with self._lock:
            self._backend.close_slot(slot)

    def trim(self, slot: int, length: int) -> int:
        with self._lock:
            return self._backend.trim(slot, length)

    def copy(self, source: int, target: int, length: int) -> int:
        with self._lock:
            return self._backend.copy(source, target, length)

    def close(self) -> None:
        with self._lock:
            self._backend.close()
