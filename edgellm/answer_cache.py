"""Answers that were made before, for the same question to the same model: in memory, or in a file for the next start.

Knows ids alone. Any number of threads and processes may share a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from edgellm.errors import ArgumentError

T = TypeVar("T")

APPLICATION = int.from_bytes(b"edgA", "big")
"""What SQLite keeps in the head of a file to tell whose it is."""
LEAST_BYTES = 65536
"""SQLite's pages take some of them before there is any answer."""
WAIT = 5.0
"""Seconds for another process that writes; then the answer is made without the cache."""


class AnswerCache:
    """For `edgellm.load(model, answer_cache=AnswerCache("answers.db"))`: an answer that is determined, by temperature 0
    or a seed, is made once, and given again at once to the same question: the same tokens, to the same model, with the
    same options. One cache may serve several models."""

    def __init__(self, path: str | os.PathLike[str] | None = None, *, most_bytes: int = 64_000_000) -> None:
        """In the file `path`, or in memory. Beyond `most_bytes` the answers go that were not asked for the longest.

        Raises ArgumentError for a file that is something else. One that is damaged is put aside with a RuntimeWarning,
        and made anew; where the cache fails later, a RuntimeWarning says so, and answers are made without it.
        """
        if most_bytes < LEAST_BYTES:
            raise ArgumentError(f"most_bytes is {most_bytes}; expected {LEAST_BYTES} or more")
        self._path = None if path is None else Path(path)
        self._most_bytes, self._lock = most_bytes, threading.RLock()
        self._open()

    def get(self, question: Mapping[str, Any]) -> tuple[list[int], str] | None:
        """The tokens that answered it before, that which ended the answer included, and the finish_reason."""
        return self._try(lambda: self._get(_key(question)))

    def put(self, question: Mapping[str, Any], ids: Sequence[int], finish_reason: str) -> None:
        """Keep an answer."""
        self._try(lambda: self._put(_key(question), ids, finish_reason))

    def clear(self) -> None:
        """Forget all answers."""
        self._try(lambda: self._database.execute("DELETE FROM answers"))

    def __len__(self) -> int:
        """How many answers are kept."""
        return self._try(self._count) or 0

    def close(self) -> None:
        """Nothing is found or kept any more."""
        with self._lock:
            self._closed()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        try:
            self._database = self._connected()
        except sqlite3.OperationalError as error:
            raise ArgumentError(f"{self._path} cannot be opened as an answer cache: {error}") from error
        except sqlite3.DatabaseError as error:
            self._put_aside(error)
            self._database = self._connected()
        self._closed = weakref.finalize(self, self._database.close)

    def _connected(self) -> sqlite3.Connection:
        if self._path:
            _check_kind(self._path)
        database = sqlite3.connect(
            self._path or ":memory:", timeout=WAIT, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(database)
        except BaseException:
            database.close()
            raise
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        (kind,) = database.execute("PRAGMA application_id").fetchone()
        (n_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if n_tables and kind != APPLICATION:
            raise ArgumentError(f"{self._path} is the database of another program; name another file")
        # Readers do not wait for a writer; with the power the last answers may go, and nothing else.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        if not n_tables:
            database.execute("BEGIN IMMEDIATE")
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(
                "CREATE TABLE IF NOT EXISTS answers (used INTEGER PRIMARY KEY, question BLOB UNIQUE, answer BLOB)"
            )
            database.execute("COMMIT")

    def _get(self, key: bytes) -> tuple[list[int], str] | None:
        row = self._database.execute("SELECT answer FROM answers WHERE question = ?", (key,)).fetchone()
        if row is None:
            return None
        answer = _unpacked(key, row[0])
        self._database.execute(
            "UPDATE answers SET used = (SELECT max(used) + 1 FROM answers) WHERE question = ?", (key,)
        )
        return answer

    def _put(self, key: bytes, ids: Sequence[int], finish_reason: str) -> None:
        packed = _packed(key, ids, finish_reason)
        self._database.execute("INSERT OR REPLACE INTO answers (question, answer) VALUES (?, ?)", (key, packed))
        while self._bytes() > self._most_bytes and (n := self._count()):
            self._database.execute(
                "DELETE FROM answers WHERE used IN (SELECT used FROM answers ORDER BY used LIMIT ?)", (n // 8 + 1,)
            )

    def _bytes(self) -> int:
        """What holds answers; an empty cache has some pages too."""
        total, free, size = (self._number(f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size"))
        return (total - free) * size

    def _count(self) -> int:
        return self._number("SELECT count(*) FROM answers")

    def _number(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])

    def _try(self, work: Callable[[], T]) -> T | None:
        """An answer is made, whatever becomes of the cache."""
        with self._lock:
            if not self._closed.alive:
                return None
            try:
                return work()
            except sqlite3.OperationalError as error:  # busy, or the disk is full
                _warn(f"the answer cache {self._path} did not work: {error}; the answer is made without it")
            except sqlite3.DatabaseError as error:
                self._closed()
                self._put_aside(error)
                self._open()
            return None

    def _put_aside(self, error: Exception) -> None:
        if self._path is None:
            raise error
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
        _warn(f"the answer cache {self._path} is damaged ({error}); it is put aside as {aside.name} and made anew")
        try:
            self._path.rename(aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        except OSError as failed:
            raise ArgumentError(f"{self._path} cannot be put aside: {failed.strerror}; delete it") from failed


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _check_kind(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ArgumentError(f"{path} cannot be opened as an answer cache: {error.strerror}") from error
    if head and head != b"SQLite format 3\0":
        raise ArgumentError(f"{path} is no answer cache; expected a file that edgellm wrote, or none")


def _key(question: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(question, default=_plain).encode()).digest()


def _plain(value: Any) -> Any:
    """What JSON has for something that it does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value):
        return vars(value)
    return value.item() if isinstance(value, np.generic) else list(value)


def _packed(key: bytes, ids: Sequence[int], finish_reason: str) -> bytes:
    """Checksum, bound to the question | length of the reason | reason | ids."""
    reason = finish_reason.encode()
    content = struct.pack(f"<B{len(reason)}s{len(ids)}I", len(reason), reason, *ids)
    return zlib.crc32(key + content).to_bytes(4, "little") + content


def _unpacked(key: bytes, packed: object) -> tuple[list[int], str]:
    if not isinstance(packed, bytes) or packed[:4] != zlib.crc32(key + packed[4:]).to_bytes(4, "little"):
        raise sqlite3.DatabaseError("an answer does not match its checksum")
    try:
        start = 5 + packed[4]
        return list(struct.unpack(f"<{(len(packed) - start) // 4}I", packed[start:])), packed[5:start].decode()
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise sqlite3.DatabaseError(f"an answer is malformed: {error}") from error
