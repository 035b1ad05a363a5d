"""Who may ask: keys, hosts against DNS rebinding, origins against other sites' pages, slow clients."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgellm.errors import ArgumentError
from edgellm.server.errors import RequestError, refusal

OPEN = ("/health", "/v1/health", "/ready")
"""Paths that need no key: a supervisor asks for them."""
WRONG_KEY = RequestError(
    "the key is missing or wrong; expected one of the server's, as Authorization: Bearer KEY",
    status=401,
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)
SLOW = 30.0
"""Seconds that a client may take to send the head of a request, or not to read while an answer waits for it."""


def is_local(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_public(host: str, has_keys: bool, without_key: bool) -> None:
    """Raise ArgumentError for a server that everybody could use unasked."""
    if not is_local(host) and not has_keys and not without_key:
        raise ArgumentError(
            f"the host {host} can be reached from other machines, and no key is asked for; expected --api-key-file or "
            "EDGELLM_API_KEY, or --without-key if everybody who reaches it may use it"
        )


class Hosts:
    """Answers only requests to addresses, and to names that are known.

    The page of a stranger can make its own name mean 127.0.0.1, and then read what this server says; and any page can
    send a form to an address.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], origins: Iterable[str]) -> None:
        self._app, self._names, self._origins = app, {"localhost", *names}, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check_host(headers.get("host", ""))
                self._check_origin(headers.get("origin"), headers.get("host", ""))
            except RequestError as error:
                app = refusal(error, scope["path"])
        await app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        name = _name(f"//{host}")
        if name is None or not (name in self._names or _is_address(name)):
            raise RequestError(
                f"the host {host[:80]!r} is not known here; expected an address, or one of "
                f"{', '.join(sorted(self._names))}: start the server with --allow-host NAME",
                status=403,
            )

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin is None or "*" in self._origins or origin in self._origins or origin.partition("://")[2] == host:
            return
        raise RequestError(
            f"pages of {origin[:80]!r} may not use this server; expected no other site's: start it with "
            "--allow-origin if they may",
            status=403,
        )


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class Keys:
    """Asks for one of some keys, as OpenAI's clients send it or as Anthropic's do."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: Iterable[str] = ()) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]
        self._open = {*OPEN, *open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and self._keys and scope["path"] not in self._open
        app = self._app
        if asks and not self._is_known(Headers(scope=scope)):
            app = refusal(WRONG_KEY, scope["path"])
        await app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        """In a time that says nothing of how much of which key was right."""
        bearer = headers.get("authorization", "")
        given = bearer[7:] if bearer[:7].lower() == "bearer " else headers.get("x-api-key", "")
        return sum([hmac.compare_digest(given.encode("latin-1"), key) for key in self._keys]) > 0


class Protocol(H11Protocol):
    """HTTP of uvicorn, which lets go of clients that take too long to send a head, or to read."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("_head")
        elif self._head is None:
            self._await_head()

    def on_response_complete(self) -> None:
        self._stop("_head")
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_head")
        self._stop("_unread")
        super().connection_lost(exc)
        self.cycle = None  # type: ignore[assignment]  # which knows this connection

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(SLOW, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_unread")

    def _await_head(self) -> None:
        self._head = self.loop.call_later(SLOW, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        setattr(self, name, None)
        if timer:
            timer.cancel()
