"""A file of requests, one a line, and the file of their results, each of which is appended once. Knows no model."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from edgellm.errors import ArgumentError
from edgellm.home import home
from edgellm.shared import alone

ID = "batch_req_"
HEAD = f'{{"id": "{ID}'.encode()
"""What a result begins with."""
SYNC = 1.0
"""Seconds after which a result is on the disk at the latest."""


class Line(NamedTuple):
    custom_id: str
    raw: bytes
    """The request as it stands in the file, a JSON object."""


class Answered(NamedTuple):
    custom_id: str
    status: int
    request_id: str
    body: bytes
    """JSON: an answer, or with a status of 400 and above what is wrong."""
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Requests:
    """The lines of a file, each with a `custom_id` of its own."""

    def __init__(self, path: Path) -> None:
        """Reads it once; raises ArgumentError for a line that is none."""
        self.path, self._digests = path, dict[str, bytes]()
        numbers: dict[str, int] = {}
        for number, line in self._read():
            if line.custom_id in numbers:
                raise ArgumentError(
                    f"{path} has the custom_id {_shown(line.custom_id)} in line {numbers[line.custom_id]} and in line "
                    f"{number}; expected another one in each: results are told apart by it"
                )
            numbers[line.custom_id] = number
            self._digests[line.custom_id] = hashlib.sha256(line.raw).digest()

    def __len__(self) -> int:
        return len(self._digests)

    def ids(self, model: str) -> dict[str, str]:
        """custom_id -> the id of its result, which is another one for another text of the line or another model."""
        return {
            custom_id: ID + hashlib.sha256(model.encode() + digest).hexdigest()[:32]
            for custom_id, digest in self._digests.items()
        }

    def without(self, done: Mapping[str, Any]) -> Iterator[Line]:
        """The lines that are not done yet; raises ArgumentError if the file has changed since it was read first."""
        for _, line in self._read():
            if self._digests.get(line.custom_id) != hashlib.sha256(line.raw).digest():
                raise ArgumentError(f"{self.path} has changed meanwhile; expected it to stay as it was")
            if line.custom_id not in done:
                yield line

    def _read(self) -> Iterator[tuple[int, Line]]:
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                raw = raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
                if raw:
                    yield number, Line(_custom_id(raw, f"{self.path} line {number}"), raw)


def _custom_id(raw: bytes, where: str) -> str:
    try:
        line = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{where} is no JSON ({error}); expected a request in each line") from None
    custom_id = line.get("custom_id") if isinstance(line, dict) else None
    if not isinstance(custom_id, str):
        raise ArgumentError(f"{where} has no custom_id; expected an object with a text of that name")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{where} has half a character in its custom_id; expected a text") from None
    return custom_id


class Results:
    """The file of results, in the order in which they came: what is in it already is kept, a last line that was cut is
    taken out. Use in a with-statement."""

    def __init__(self, path: Path, ids: Mapping[str, str], source: Path) -> None:
        """`ids` are those of Requests, of the file `source`. Raises ArgumentError for a file of anything else."""
        self.path, self._ids, self._source = path, ids, source
        self.done: dict[str, int] = {}
        """custom_id -> status."""

    def __enter__(self) -> Results:
        with ExitStack() as stack:
            where = self.path.resolve()
            lock = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
            stack.enter_context(alone(home() / "batches" / f"{lock}-{self.path.name[-100:]}"))
            if self.path.exists() and self._source.samefile(self.path):
                raise ArgumentError(f"{self.path} is the file of requests too; expected another one for the results")
            whole = self._read()
            self._file = stack.enter_context(self.path.open("ab"))
            self._file.truncate(whole)
            self._synced = time.monotonic()
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            os.fsync(self._file.fileno())

    def add(self, answered: Answered) -> None:
        """Once for each custom_id."""
        assert answered.custom_id not in self.done
        response = {
            "status_code": answered.status, "request_id": answered.request_id, "body": json.loads(answered.body)
        }  # fmt: skip
        result = {
            "id": self._ids[answered.custom_id], "custom_id": answered.custom_id, "response": response, "error": None
        }  # fmt: skip
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done[answered.custom_id] = answered.status
        if time.monotonic() - self._synced > SYNC:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _read(self) -> int:
        """Note what there is; the length of the whole lines."""
        if not self.path.exists():
            return 0
        whole = 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    self._check_cut(raw, number)
                    break
                self._note(raw, number)
                whole += len(raw)
        return whole

    def _check_cut(self, raw: bytes, number: int) -> None:
        """A power cut may leave zeros."""
        if raw.strip(b"\0") and raw[: len(HEAD)] != HEAD[: len(raw)]:
            raise self._of_another(number)

    def _note(self, raw: bytes, number: int) -> None:
        try:
            result = json.loads(raw)
            custom_id, status = result["custom_id"], result["response"]["status_code"]
            fits = self._ids[custom_id] == result["id"] and isinstance(status, int)
        except (ValueError, RecursionError, TypeError, KeyError):
            raise self._of_another(number) from None
        if not fits or custom_id in self.done:
            raise self._of_another(number)
        self.done[custom_id] = status

    def _of_another(self, number: int) -> ArgumentError:
        return ArgumentError(
            f"{self.path} line {number} is no result of {self._source} with this model, or is there twice; expected a "
            "file that this command began, to go on with, or a name that is free"
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
