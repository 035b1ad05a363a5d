"""The page to chat on, at /: the files beside this one, as they are. The browser asks the API, nothing else."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Even if a model's text were taken for HTML, it could run nothing and tell nobody."""
HEADERS = {
    "cache-control": "no-cache",  # the browser asks each time whether the ETag still holds
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
}


class File:
    """One file of the page, in memory."""

    def __init__(self, file: Path) -> None:
        self.path = "/" if file.name == "index.html" else f"/page/{file.name}"
        self._raw = file.read_bytes()
        self._packed = gzip.compress(self._raw, mtime=0)
        self._tag = f'"{hashlib.sha256(self._raw).hexdigest()[:32]}"'
        self._type = TYPES[file.suffix]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._response(Headers(scope=scope))(scope, receive, send)

    def _response(self, asked: Headers) -> Response:
        headers = {**HEADERS, "etag": self._tag}
        if self._tag in asked.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in asked.get("accept-encoding", ""):
            return Response(self._packed, headers={**headers, "content-encoding": "gzip"}, media_type=self._type)
        return Response(self._raw, headers=headers, media_type=self._type)


def routes() -> list[Route]:
    files = (File(path) for path in sorted(Path(__file__).parent.iterdir()) if path.suffix in TYPES)
    return [Route(file.path, file, methods=["GET"]) for file in files]
