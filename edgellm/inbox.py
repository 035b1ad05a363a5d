"""What other threads tell a task of an event loop. Knows no model."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

PAUSE = 0.01
"""Seconds after a wake-up in which items pile up. A loop that wakes for each token of a quick model takes a tenth of
its speed, and screens show no more than 60 pictures a second."""

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items of any thread, in order, for one task. It is woken at once, and again as soon as PAUSE is over."""

    def __init__(self, pause: float | None = PAUSE) -> None:
        """In the thread of the event loop. Without a pause, only an urgent item wakes."""
        self._loop, self._pause = asyncio.get_running_loop(), pause
        self._items: deque[T] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._is_awake = pause is None
        """The loop will look for itself whether there is more."""

    def put(self, item: T, urgent: bool = False) -> None:
        """Raises RuntimeError when the loop is closed."""
        self._items.append(item)
        if urgent:
            self._loop.call_soon_threadsafe(self._deliver)
        elif not self._is_awake:
            self._is_awake = True
            self._loop.call_soon_threadsafe(self._wake)
        elif self._loop.is_closed():
            raise RuntimeError("the event loop is closed")

    async def get(self) -> T:
        """The next item."""
        while not self._items:
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self._items.popleft()

    @property
    def is_empty(self) -> bool:
        return not self._items

    def _wake(self) -> None:
        self._deliver()
        self._loop.call_later(self._pause or 0, self._look)

    def _look(self) -> None:
        self._is_awake = False
        # Also what came before the line above, and so woke nobody. A task that does not wait looks itself, or has gone.
        if self._items and self._waiting:
            self._is_awake = True
            self._wake()

    def _deliver(self) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)
