"""An answer for an event loop: a model's engine makes it, and the loop does other things meanwhile."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from edgellm.answer import Answer, Completion, Piece, Timings, Turn
from edgellm.engine import Event, Job, Listener
from edgellm.inbox import Inbox


class AsyncStream(AsyncIterator[Piece]):
    """An answer while it is generated, beside others of the same model. Iterate for the pieces; `completion` has all
    that came so far, and may be some tokens ahead of them.

    It begins when the first piece is asked for, which raises what is wrong with the prompt or the options. It stops, at
    any token, when it is closed (`aclose`, or leaving an async with-statement), when a task that waits for a piece is
    cancelled, and when nobody has it any more, as after a `break`.
    """

    def __init__(self, begin: Callable[[], tuple[Answer, Turn]], submit: Callable[[Answer, Listener], Job]) -> None:
        """`begin` is called in another thread than the loop's."""
        self.completion = Completion("", [], "cancelled", [], Timings())
        self._begin, self._submit, self._turn = begin, submit, Turn()
        self._events: Inbox[Event] | None = None
        self._stop: weakref.finalize[..., AsyncStream] | None = None
        self._is_over = False

    async def __anext__(self) -> Piece:
        try:
            while not self._is_over:
                if piece := await self._piece():
                    return piece
        except BaseException:
            await self.aclose()
            raise
        raise StopAsyncIteration

    async def _piece(self) -> Piece | None:
        if self._events is None:
            self._events = Inbox()
            await self._start(self._events)
        event = await self._events.get()
        if isinstance(event, Piece):
            return self._turn.show(event)
        if isinstance(event, Exception):
            raise event
        last = self._turn.finish()
        await self.aclose()
        return last

    async def _start(self, events: Inbox[Event]) -> None:
        # Long texts take long to encode, grammars to compile.
        answer, self._turn = await asyncio.to_thread(self._begin)
        self.completion = answer.completion
        job = self._submit(answer, lambda event: events.put(event, urgent=not isinstance(event, Piece)))
        self._stop = weakref.finalize(self, _stop, job, self._turn)

    async def aclose(self) -> None:
        """Stop; what was said stays in `completion`."""
        self._is_over = True
        if self._stop:
            self._stop()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _stop(job: Job, turn: Turn) -> None:
    job.cancel()
    turn.remember()
