"""What several processes share in the user's cache: folders, locks, and what was found out about files."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from edgellm.errors import ArgumentError, EdgeError
from edgellm.home import home


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is at work on `path`. The system ends a lock with its process, however that ends."""
    make_folder(path.parent)
    with _lock_file(path) as handle:
        _wait_for(handle, path)
        yield


def _lock_file(path: Path) -> IO[bytes]:
    try:
        return path.with_name(path.name + ".lock").open("ab")
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _wait_for(handle: IO[bytes], path: Path) -> None:
    try:
        if not _lock(handle):
            print(f"waiting for another edgellm that is at work on {path.name}", file=sys.stderr, flush=True)
            while not _lock(handle):
                time.sleep(0.1)
    except OSError as error:  # a file system without locks
        raise _unwritable(path.parent, error) from error


if sys.platform == "win32":

    def _lock(handle: IO[bytes]) -> bool:
        import msvcrt

        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True
else:

    def _lock(handle: IO[bytes]) -> bool:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> EdgeError:
    return EdgeError(
        f"the folder {folder} cannot be written: {error.strerror}; set EDGELLM_HOME to a folder that can be"
    )


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses now."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def keep(path: Path, content: bytes) -> None:
    """Write what can be made again, whole or not at all; where that cannot be, nothing is kept."""
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` once all of it is on disk; raises ArgumentError where that cannot
    be. Whatever goes wrong, the old file stays."""
    part = temporary_name(path)
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be written: {error.strerror or error}; the old file is as it was"
        ) from error
    finally:
        part.unlink(missing_ok=True)


class Memo:
    """What was found out about files: a word for each (path, size, mtime_ns), so that a changed file is an unknown one.

    A convenience: where it cannot be read it is empty, where it cannot be written nothing is remembered, and of two
    processes that write at once one may be forgotten.
    """

    LIMIT = 1000

    def __init__(self, name: str) -> None:
        self._path = home() / name

    def get(self, path: Path) -> str | None:
        with suppress(OSError):
            return self._read().get(_fingerprint(path))
        return None

    def put(self, path: Path, word: str) -> None:
        with suppress(OSError):
            words = self._read()
            fingerprint = _fingerprint(path)
            words.pop(fingerprint, None)
            latest = dict([*words.items(), (fingerprint, word)][-self.LIMIT :])
            keep(self._path, json.dumps(latest, indent=0).encode())

    def _read(self) -> dict[str, str]:
        try:
            words = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        sound = isinstance(words, dict) and all(isinstance(word, str) for word in words.values())
        return words if sound else {}


def _fingerprint(path: Path) -> str:
    """Raises OSError if nothing is there."""
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
