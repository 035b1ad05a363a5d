"""JSON that strangers wrote: an object in which each key stands once. Knows no key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgellm.errors import CheckpointError

from .checkpoint import unreadable

MAX_BYTES = 100_000_000
"""Of a file of JSON or text; also the limit that the safetensors format sets to its headers."""


def read_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a file, or an empty one where an optional file is not there. Raises CheckpointError."""
    if optional and not path.exists():
        return {}
    return parse_object(path, read_whole(path))


def read_whole(path: Path, limit: int = MAX_BYTES) -> bytes:
    """All bytes of a file of at most `limit`. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path} has {size} bytes; expected at most {limit}: it is damaged")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def parse_object(path: Path, text: bytes) -> dict[str, Any]:
    """Raises CheckpointError unless `text`, which comes from `path`, is a JSON object with each key once."""
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_int=_number)
    except RecursionError as error:
        raise CheckpointError(f"{path} is JSON nested too deep; expected a plain object") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not sound JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _number(digits: str) -> int | float:
    # Python fails to print or to round integers of thousands of digits; as a float none is taken for a size or an id.
    return int(digits) if len(digits) <= 18 else float(digits)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict[str, Any]()
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:200]!r} stands there twice")
        result[key] = value
    return result
