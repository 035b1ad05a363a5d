"""Answers that are sent while they are made: server-sent events, or lines of JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from edgellm.answer import Answer
from edgellm.server.endpoint import unless_gone
from edgellm.server.errors import RequestError, openai
from edgellm.server.log import told
from edgellm.server.service import Answers, Call

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
encode = json.JSONEncoder(separators=(",", ":")).encode


class Asked(Protocol):
    @property
    def answers(self) -> Sequence[Answer]: ...


A = TypeVar("A", bound=Asked)


def event(value: Any) -> bytes:
    return f"data: {encode(value)}\n\n".encode()


class Wire(NamedTuple):
    """How an answer is sent while it is made."""

    media_type: str
    error: Callable[[RequestError], bytes]
    """What a stream ends with that something went wrong in."""
    is_default: bool = False
    """Whether an answer is streamed if the request does not say."""


SSE = Wire("text/event-stream", lambda error: event(openai(error)))


def answering(
    prepare: Callable[[Call], A],
    whole: Callable[[Call, A, Answers], Awaitable[Response]],
    chunks: Callable[[Call, A, Answers], AsyncGenerator[bytes, None]],
    wire: Wire = SSE,
) -> Callable[[Call], Awaitable[Response]]:
    """Who answers at an endpoint that makes texts: whole, or streamed if that is asked for."""

    async def answer(call: Call) -> Response:
        await call.load()
        asked = await run_in_threadpool(prepare, call)
        streams = call.fields.get("stream", wire.is_default)
        answers = Answers(call, asked.answers, streams)
        if streams:
            return Events(call, answers, chunks(call, asked, answers), wire)
        with closing(answers):
            return await whole(call, asked, answers)

    return answer


class Events(StreamingResponse):
    """What is told of answers, which are stopped when their client has gone; what goes wrong midway comes last."""

    def __init__(self, call: Call, answers: Answers, events: AsyncGenerator[bytes, None], wire: Wire) -> None:
        super().__init__(events, media_type=wire.media_type, headers={"cache-control": "no-store"})
        self._call, self._answers, self._events, self._wire = call, answers, events, wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(Request(scope, receive), self.stream_response(send))
        finally:
            self._answers.close()
            await self._events.aclose()

    async def stream_response(self, send: Send) -> None:
        """What was told at once is sent at once: at a few milliseconds a token, each message counts."""
        parts: list[bytes] = []

        async def flush(more: bool = True) -> None:
            body = b"".join(parts)
            parts.clear()
            if body or not more:
                await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._answers.before_waiting = flush
        try:
            async for each in self._events:
                parts.append(each)
        except Exception as error:
            parts.append(self._wire.error(told(error, self._call.notes)))
        await flush(more=False)
