"""What endpoints share: the models that are served, and the answers that are made of them side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellm.answer import Answer, Completion, Piece
from edgellm.engine import Event, Job, Listener
from edgellm.errors import EdgeError
from edgellm.footprint import resident_memory
from edgellm.inbox import PAUSE, Inbox
from edgellm.server.errors import RequestError
from edgellm.server.metrics import Metrics
from edgellm.server.models import Models, Served, Terms

PING = 15.0
"""Seconds between signs of life in a stream."""
RETRY_AFTER = 2
"""Seconds after which a client that found no room may ask again."""


@dataclass(frozen=True)
class Limits:
    queue: int
    """Answers that wait for a slot, all models together; one more is refused."""
    seconds: float
    """For all of a request."""


class Service:
    def __init__(self, named: Mapping[str, Path], terms: Terms, limits: Limits) -> None:
        """See Models for what is `named`."""
        self.limits, self.metrics, self.under_way = limits, Metrics(), 0
        self.models = Models(named, terms, self.metrics)

    @asynccontextmanager
    async def model(self, name: str | None = None, keep_alive: float | None = None) -> AsyncIterator[Served]:
        """A model by its name, or the first one: loaded if it must be, it stays so meanwhile, and for `keep_alive`
        seconds more if that is given.

        Raises ModelNotFoundError, and RequestError if it cannot be loaded, in time, or too many wait for that.
        """
        name = self.models.name_of(name)
        with nullcontext() if self.models.is_at_hand(name) else self.place():
            served = await self.models.take(name, keep_alive, self.limits.seconds)
        try:
            yield served
        finally:
            self.models.release(served)

    @property
    def room(self) -> int:
        """Answers that can still be taken in."""
        return self.most - self.under_way

    @property
    def most(self) -> int:
        """Answers that are taken in at once, to be made or to wait."""
        return self.models.slots + self.limits.queue

    @contextmanager
    def place(self) -> Iterator[None]:
        """Counts as an answer; raises RequestError if there is no room for one more."""
        self.check_room(1)
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def check_room(self, n_answers: int) -> None:
        """Raise RequestError if there is no room for as many more answers."""
        if n_answers > self.most:
            raise RequestError(
                f"{n_answers} answers are asked for at once, n to each prompt; expected at most {self.most}: "
                "ask for them in several requests"
            )
        if n_answers > self.room:
            raise RequestError(
                f"the server is busy with {self.under_way} answers; expected room for {n_answers} more: ask again "
                "later",
                status=503, headers={"retry-after": str(RETRY_AFTER)},
            )  # fmt: skip

    def gauges(self) -> dict[str, tuple[str, float]]:
        values: dict[str, tuple[str, float]] = {
            "edgellm_slots": ("Answers that can be made at once.", self.models.slots),
            "edgellm_answers": ("Answers that are made or wait.", self.under_way),
            "edgellm_queue": ("Answers that there is no slot for yet.", max(0, self.under_way - self.models.slots)),
            "edgellm_models_loaded": ("Models that are loaded.", len(self.models.loaded)),
            "edgellm_models_bytes": ("Memory that these may come to take.", self.models.n_bytes),
            "edgellm_cache_bytes": ("Memory of tokens at rest, for prompts that begin so.", self.models.n_cached_bytes),
        }
        if (n_bytes := resident_memory()) is not None:
            values["edgellm_resident_bytes"] = ("Memory of the process, mapped weights included.", n_bytes)
        return values


@dataclass
class Call:
    """A request that an endpoint answers."""

    service: Service
    fields: dict[str, Any]
    """Of its body."""
    params: Mapping[str, str]
    """Of its path, and its query."""
    notes: dict[str, Any]
    """What the log shows of it."""

    held: AsyncExitStack
    """What is given back once the request is answered."""
    started: float = field(default_factory=time.perf_counter)
    load_seconds: float = 0.0
    """What it took to load the model, or to find it loaded."""
    _served: Served | None = None

    async def load(self) -> Served:
        """The model that the request asks for, loaded if it must be; until the request is answered."""
        asked, keep_alive = self.fields.get("model", self.params.get("model")), self.fields.get("keep_alive")
        self._served = await self.held.enter_async_context(self.service.model(asked, keep_alive))
        self.notes["model"], self.load_seconds = self._served.name, time.perf_counter() - self.started
        return self._served

    @property
    def served(self) -> Served:
        """What was loaded."""
        assert self._served, "load comes first"
        return self._served


class Answers:
    """The answers to one request while they are made; closing it stops those that are not complete."""

    def __init__(self, call: Call, answers: Sequence[Answer], streams: bool) -> None:
        """Raises RequestError if there is no room for as many. In the thread of the event loop."""
        call.service.check_room(len(answers))
        self._call, self._service, self._n = call, call.service, len(answers)
        self.answers = answers
        self.before_waiting: Callable[[], Awaitable[None]] | None = None
        """Awaited by `events` when nothing more has been told: then what was made of it is to be sent."""
        # Nobody reads a whole answer before its end.
        self._inbox = Inbox[tuple[int, Event, float] | EdgeError | None](PAUSE if streams else None)
        loop, limits = asyncio.get_running_loop(), self._service.limits
        self._loop, self._started = loop, time.perf_counter()
        self._last: dict[int, float] = {}
        self._service.under_way += self._n
        self._ping = loop.call_later(PING, self._sign_of_life)
        self._end = loop.call_later(limits.seconds, self._inbox.put, too_slow(limits.seconds), True)
        self._jobs: list[Job] = []
        try:
            for i, answer in enumerate(answers):
                self._jobs.append(call.served.model.submit(answer, self._listener(i)))
        except BaseException:
            self.close()
            raise

    def _listener(self, which: int) -> Listener:
        def listen(event: Event) -> None:
            self._inbox.put((which, event, time.perf_counter()), urgent=not isinstance(event, Piece))

        return listen

    def _sign_of_life(self) -> None:
        self._inbox.put(None, urgent=True)
        self._ping = self._loop.call_later(PING, self._sign_of_life)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Completion] | None]:
        """(which answer, a piece of it or, as its last, all of it), and None now and then as a sign of life.

        Raises RequestError after the time that a request may take, and what was raised in making an answer.
        """
        left = self._n
        while left:
            if self.before_waiting and self._inbox.is_empty:
                await self.before_waiting()
            event = await self._inbox.get()
            if isinstance(event, EdgeError):
                raise event
            if event is None:
                yield None
                continue
            which, told, at = event
            if isinstance(told, Exception):
                raise told
            if isinstance(told, Completion):
                left -= 1
            elif told.id is not None:
                self._measure(which, at)
            yield which, told

    def _measure(self, which: int, now: float) -> None:
        """Of a token."""
        metrics = self._service.metrics
        if which in self._last:
            metrics.next_token.add(now - self._last[which])
        else:
            metrics.first_token.add(now - self._started)
        self._last[which] = now

    def when_idle(self, opening: Callable[[], Sequence[int]]) -> None:
        """See Model.when_idle."""
        self._call.served.model.when_idle(opening)

    def close(self) -> None:
        """Once; the slots are free for others at the next step."""
        self._ping.cancel()
        self._end.cancel()
        for job in self._jobs:
            job.cancel()
        # Jobs know whom they tell: without them memory is free at once, not when Python looks for such circles.
        self._jobs, self.before_waiting = [], None
        self._service.under_way -= self._n
        self._count()

    def _count(self) -> None:
        metrics, model = self._service.metrics, self._call.served.name
        timings = [answer.completion.timings for answer in self.answers]
        prompts, cached, generated = (
            sum(getattr(each, name) for each in timings)
            for name in ("prompt_tokens", "cached_tokens", "generated_tokens")
        )
        metrics.prompt_tokens.add(prompts, model=model)
        metrics.cached_tokens.add(cached, model=model)
        metrics.generated_tokens.add(generated, model=model)
        self._call.notes.update(prompt_tokens=prompts, cached_tokens=cached, generated_tokens=generated)


def too_slow(seconds: float) -> RequestError:
    return RequestError(
        f"the answer was not complete after {seconds:g} seconds, so it was stopped; ask for fewer tokens, or start "
        "the server with a longer --timeout",
        status=504, headers={"x-should-retry": "false"},
    )  # fmt: skip
