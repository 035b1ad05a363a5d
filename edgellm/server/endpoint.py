"""One endpoint: where it is, what it takes, and who answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgellm.server.body import read_json
from edgellm.server.errors import refusal
from edgellm.server.log import told
from edgellm.server.schema import Object
from edgellm.server.service import Call

T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """`answer` is called with what `body` has read; None for an endpoint that takes no body."""

    method: str
    paths: Sequence[str]
    answer: Callable[[Call], Awaitable[Response]]
    body: Object | None = None

    @property
    def path(self) -> str:
        """The one it is known by."""
        return self.paths[0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with AsyncExitStack() as held:
            try:
                response = await self._response(request, held)
            except ClientDisconnect:
                return
            except Exception as error:
                response = refusal(told(error, request.state.notes), scope["path"])
            await response(scope, receive, send)

    async def _response(self, request: Request, held: AsyncExitStack) -> Response:
        fields = await read_json(request, self.body.read) if self.body else {}
        params = {**request.query_params, **request.path_params}
        call = Call(request.app.state.service, fields, params, request.state.notes, held)
        return await unless_gone(request, self.answer(call))


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer; if its client hangs up before, it is cancelled, and ClientDisconnect raised."""
    making, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({making, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            raise ClientDisconnect
        return making.result()
    finally:
        for task in (making, gone):
            task.cancel()
        await asyncio.gather(making, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
