"""One line of JSON for each request: what was asked of what, how it went, and no text of it."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgellm.errors import EdgeError
from edgellm.server.errors import RequestError, refusal
from edgellm.server.metrics import Metrics

logger = logging.getLogger("edgellm.server")
NOTHING_SENT = 499
"""In place of a status: the client has gone before."""


class Lines(logging.Formatter):
    """Records as lines of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}", "level": record.levelname.lower()}
        line |= record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Log:
    """Notes every request, and answers what nobody else has answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), NOTHING_SENT
        notes: dict[str, Any] = {"request": uuid.uuid4().hex[:16]}
        scope["state"]["notes"] = notes

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", notes["request"].encode())]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            pass
        except Exception as error:
            refused = told(error, notes)
            if status != NOTHING_SENT:
                raise  # too late for another status: the connection is cut
            await refusal(refused, scope["path"])(scope, receive, noting)
        finally:
            path = getattr(scope.get("endpoint"), "path", "other")
            self._metrics.requests.add(path=path, status=str(status))
            client = scope["client"][0] if scope.get("client") else None
            line = {"method": scope["method"], "path": scope["path"][:200], "status": status, "client": client}
            logger.info({**line, "seconds": round(time.perf_counter() - started, 4), **notes})


def told(error: Exception, notes: Mapping[str, Any]) -> RequestError:
    """What a client hears of an error: of one of the server's own, which goes to the log, only where to find it."""
    if isinstance(error, EdgeError) and (refused := RequestError.of(error)).status != 500:
        return refused
    logger.error({"request": notes["request"], "message": "an error of the server's own"}, exc_info=error)
    return RequestError(f"the server failed at request {notes['request']}; its log says how", status=500)
