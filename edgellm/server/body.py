"""The bytes of a request -> the JSON they are, within bounds of size, depth and time."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from edgellm.server.errors import RequestError

MAX_BYTES = 10_000_000
"""A context of a million tokens has less text."""
MAX_DEPTH = 64
"""Schemas of tools have a dozen levels or so."""
SECONDS = 30.0
"""For all of the body to arrive."""
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
SMALL = 20_000
"""Bytes that are sooner read than handed to another thread."""

T = TypeVar("T")


async def read_json(request: Request, read: Callable[[Any], T]) -> T:
    """What `read` makes of the JSON. Raises RequestError for what is too large, too deep, too slow, or no JSON."""
    try:
        raw = await asyncio.wait_for(_read(request), SECONDS)
    except asyncio.TimeoutError:
        raise RequestError(
            f"the body did not arrive within {SECONDS:.0f} seconds; expected all of it: send it again",
            status=408, headers={"connection": "close"},
        ) from None  # fmt: skip
    if len(raw) < SMALL:
        return read(parse(raw))
    return await run_in_threadpool(lambda: read(parse(raw)))


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BYTES or int(length) > MAX_BYTES:
            raise RequestError(
                f"the body has more than {MAX_BYTES} bytes; expected at most so many: send less text",
                status=413,
            )
    return bytes(raw)


def parse(raw: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 at byte {error.start}; expected JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is no JSON: {error.msg} at character {error.pos}; expected an object") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise RequestError("the body has a number of thousands of digits; expected one that a float holds") from None
    _check_depth(value)
    if HALF.search(raw):
        _check_characters(value)
    return value


def _no_number(name: str) -> NoReturn:
    raise RequestError(f"the body has the number {name}, which JSON has not; expected a finite one")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _no_number(text[:20])
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise _too_deep()


def _check_characters(value: Any) -> None:
    """JSON can escape half of a character, and no text can have it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        raise RequestError(
            f"the body has half a character, \\u{ord(half):04x}; expected both of its halves, or none"
        ) from None


def _too_deep() -> RequestError:
    return RequestError(f"the body is nested more than {MAX_DEPTH} levels deep; expected at most so many")
