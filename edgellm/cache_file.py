"""What a slot remembers, in a file, so that its tokens need not be evaluated again: of one model, on one backend.

    magic | sha256 of the rest | length of the header, 8 bytes | header, JSON | content of the slot

A file is good for what its header binds it to, and for nothing else; it is read whole, checked, and replaced whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgellm.arrays import U8, Array
from edgellm.errors import ArgumentError
from edgellm.generate import Slot
from edgellm.shared import replacing

MAGIC = b"edgellm cache 1\n"
DIGEST = len(MAGIC) + hashlib.sha256().digest_size
START = DIGEST + 8
BOUND_TO = {
    "fingerprint": "another model",
    "backend": "another backend",
    "layout": "another layout of the cache",
    "edgellm": "another version of edgellm",
    "context_length": "another context length",
    "adapter": "another adapter",
}
"""What must be the same, and how it is called where it is not."""


class Saved(NamedTuple):
    ids: list[int]
    """What the slot holds."""
    written: int
    """See Backend.content."""
    extra: Mapping[str, Any]
    """What the writer wanted to know again."""
    content: U8


def write(path: Path, bound_to: Mapping[str, Any], slot: Slot, extra: Mapping[str, Any]) -> None:
    """All or nothing; raises ArgumentError where it cannot be written."""
    written, parts = slot.backend.content(slot.number)
    header = json.dumps({**bound_to, "ids": slot.ids, "written": written, "extra": extra}).encode()
    pieces: list[bytes | memoryview] = [len(header).to_bytes(8, "little"), header, *map(_bytes, parts)]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    with replacing(path) as file:
        file.write(MAGIC + digest.digest())
        for piece in pieces:
            file.write(piece)


def _bytes(part: Array) -> memoryview:
    return np.ascontiguousarray(part).data.cast("B")


def read(path: Path, bound_to: Mapping[str, Any], vocab_size: int) -> Saved:
    """Raises ArgumentError for a file that is damaged, or bound to something else."""
    try:
        with open(path, "rb") as file:
            data: U8 = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:  # ValueError: nothing is in it
        raise ArgumentError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if data[: len(MAGIC)].tobytes() != MAGIC:
        raise ArgumentError(f"{path} is no cache of prompts; expected a file that edgellm wrote, or none")
    if hashlib.sha256(data[DIGEST:].data).digest() != data[len(MAGIC) : DIGEST].tobytes():
        raise ArgumentError(f"{path} does not match its checksum: it is damaged; delete it, and it is made anew")
    try:
        start = START + int.from_bytes(data[DIGEST:START].tobytes(), "little")
        header = json.loads(data[START:start].tobytes())
        foreign = [name for key, name in BOUND_TO.items() if header[key] != bound_to[key]]
        ids, written, extra = header["ids"], header["written"], header["extra"]
        sound = isinstance(written, int) and isinstance(extra, dict) and _are_ids(ids, vocab_size)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ArgumentError(f"{path} has a malformed header ({error!r}); delete it, and it is made anew") from None
    if foreign:
        raise ArgumentError(
            f"{path} was made with {' and '.join(foreign)}; expected the same as now: delete it, or name another file"
        )
    if not sound or not 0 < len(ids) <= min(written, bound_to["context_length"]):
        raise ArgumentError(f"{path} has a header that contradicts itself; delete it, and it is made anew")
    return Saved(ids, written, extra, data[start:])


def _are_ids(ids: Sequence[int], vocab_size: int) -> bool:
    return isinstance(ids, list) and all(type(id) is int and 0 <= id < vocab_size for id in ids)


def restore(path: Path, saved: Saved, slot: Slot) -> None:
    """Make a slot hold what was saved; raises ArgumentError, and leaves it empty, if the sizes are not those."""
    slot.trim(0)
    parts = slot.backend.restore(slot.number, len(saved.ids), saved.written)
    if sum(part.nbytes for part in parts) != len(saved.content):
        slot.trim(0)
        raise ArgumentError(f"{path} has {len(saved.content)} bytes of content, not those of its tokens; delete it")
    at = 0
    for part in parts:
        part[...] = saved.content[at : at + part.nbytes].view(part.dtype).reshape(part.shape)
        at += part.nbytes
    slot.hold(saved.ids)
