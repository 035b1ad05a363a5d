"""The application: the page and every endpoint, behind the log, the hosts and the keys."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgellm.server import page
from edgellm.server.endpoints import endpoints
from edgellm.server.errors import RequestError, refusal
from edgellm.server.log import Log
from edgellm.server.security import Hosts, Keys
from edgellm.server.service import Service

HELPERS = min(8, 2 * (os.cpu_count() or 1))
"""Threads that encode texts and compile grammars: more would be no quicker, and keep memory."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    keys: Sequence[str] = ()
    """One of them must be given; none: everybody may."""
    hosts: Sequence[str] = ()
    """Names that the server may be called by, beside localhost and addresses."""
    origins: Sequence[str] = ()
    """Sites whose pages may ask."""


def app(service: Service, access: Access, has_page: bool = True) -> Starlette:
    """Closing the app closes the service's models."""
    pages = page.routes() if has_page else []
    cors = Middleware(
        CORSMiddleware,
        allow_origins=access.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )
    made = Starlette(
        routes=[*pages, *(Route(path, each, methods=[each.method]) for each in endpoints() for path in each.paths)],
        middleware=[
            Middleware(Log, metrics=service.metrics),
            Middleware(Hosts, names=access.hosts, origins=access.origins),
            *([cors] if access.origins else []),
            Middleware(Keys, keys=access.keys, open_paths=[route.path for route in pages]),
        ],
        exception_handlers={HTTPException: _no_endpoint},
        lifespan=_lifespan,
    )
    made.router.redirect_slashes = False
    made.state.service = service
    return made


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    models = app.state.service.models
    models.start()
    to_thread.current_default_thread_limiter().total_tokens = HELPERS
    try:
        yield
    finally:
        await models.close()


async def _no_endpoint(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = dict(error.headers or {})
        message = f"{request.method} is not for {request.url.path[:100]}; expected {allowed.get('Allow')}"
        return refusal(RequestError(message, status=405, headers=allowed), request.url.path)
    message = f"there is nothing at {request.url.path[:100]}; expected an endpoint such as /v1/chat/completions"
    return refusal(RequestError(message, status=404), request.url.path)
