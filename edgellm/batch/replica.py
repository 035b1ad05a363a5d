"""A model that answers requests as the server would, without HTTP."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import JSONResponse, Response

from edgellm.api import Model
from edgellm.batch.files import Answered, Line
from edgellm.server.body import parse
from edgellm.server.endpoints import endpoints
from edgellm.server.errors import RequestError, openai
from edgellm.server.log import told
from edgellm.server.models import Terms
from edgellm.server.schema import Anything, MapOf, Object, Text
from edgellm.server.service import Call, Limits, Service

ENDPOINTS = {
    path: (endpoint, endpoint.body)
    for endpoint in endpoints()
    if endpoint.method == "POST" and endpoint.body
    for path in endpoint.paths
    if path.startswith("/v1/")
}
LINE = Object(
    {"custom_id": Text(), "method": Text(("POST",)), "url": Text(tuple(ENDPOINTS)), "body": MapOf(Anything())},
    ["custom_id", "method", "url", "body"],
)
AHEAD = 2
"""Requests under way for each slot: the next are prepared while answers are made."""


class Replica:
    """Answers of any number of requests are made side by side, all of them in one event loop."""

    def __init__(self, name: str, model: Model) -> None:
        """`name` is what requests call it by, if they do."""
        self._service = Service({name: model.path}, Terms(Model), Limits(queue=2**31, seconds=math.inf))
        self._service.models.adopt(name, model)
        self.fingerprint = model.fingerprint

    def answer_all(self, lines: Iterable[Line], tell: Callable[[Answered], object]) -> None:
        async def telling() -> None:
            async for answered in self.answers(lines):
                tell(answered)

        asyncio.run(telling())

    async def answers(self, lines: Iterable[Line]) -> AsyncIterator[Answered]:
        """In the order in which they are ready."""
        under_way = set[asyncio.Task[Answered]]()
        for line in lines:
            under_way.add(asyncio.create_task(self.answer(line)))
            if len(under_way) >= AHEAD * self._service.models.slots:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        for last in asyncio.as_completed(under_way):
            yield await last

    async def answer(self, line: Line) -> Answered:
        """What is wrong with it is its answer, too."""
        notes: dict[str, Any] = {"request": uuid.uuid4().hex[:16]}
        try:
            response = await self._response(line, notes)
        except Exception as error:
            refused = told(error, notes)
            response = JSONResponse(openai(refused), refused.status)
        tokens = notes.get("prompt_tokens", 0), notes.get("generated_tokens", 0)
        return Answered(line.custom_id, response.status_code, notes["request"], bytes(response.body), *tokens)

    async def _response(self, line: Line, notes: dict[str, Any]) -> Response:
        given = LINE.read(parse(line.raw))
        endpoint, body = ENDPOINTS[given["url"]]
        fields = body.read(given["body"])
        if fields.get("stream"):
            raise RequestError("stream is true, but a result is one line; expected false", param="stream")
        async with AsyncExitStack() as held:
            response = await endpoint.answer(Call(self._service, fields, {}, notes, held))
        assert isinstance(response, JSONResponse)
        return response
