"""What is found of many texts in groups, beside the answers to other requests."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from edgellm.server.service import Call, too_slow

T = TypeVar("T")


async def collected(call: Call, groups: Iterator[Generator[list[T], None, None]], n_tokens: int) -> list[T]:
    """All that the steps of the groups give, of so many tokens.

    A step at a time, so that answers and the groups of others go on between; a client that leaves stops it. Raises
    RequestError if there is no room, and after the time that a request may take.
    """
    service, served, found = call.service, call.served, list[T]()
    end = time.monotonic() + service.limits.seconds
    with service.place():
        for group in groups:
            async with served.grouped:
                try:
                    while (done := await run_in_threadpool(next, group, None)) is not None:
                        found += done
                        if time.monotonic() > end:
                            raise too_slow(service.limits.seconds)
                finally:
                    await run_in_threadpool(group.close)
    service.metrics.prompt_tokens.add(n_tokens, model=served.name)
    call.notes["prompt_tokens"] = n_tokens
    return found
