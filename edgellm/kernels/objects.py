"""Compiled kernels on disk: home()/kernels/KEY/, a file each. Where that fails, kernels are compiled again.

KEY is the CPU's name and a digest of everything that machine code depends on, so a folder is good or unused, never
out of date. A file is HEADER, a digest, and an image or an object file; the digest is of the key, the file's name and
that, and a file that does not match is removed and never loaded. Files are read whole and replaced whole: processes may
read, write and clear at the same time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from edgellm.home import home
from edgellm.isa import host
from edgellm.shared import keep

HEADER = b"edgellm kernel 1\n"
SUFFIX = ".kernel"
KEPT = 16
"""Folders that stay, by last use, less than a megabyte each: other versions of edgellm or Python may share the home."""
HOUR = 3600


@cache
def key() -> str:
    """The folder for this CPU, these sources and these versions."""
    digest = hashlib.sha256(repr((sys.version, platform.python_implementation(), *host())).encode())
    for package in ("numba", "llvmlite"):
        found = find_spec(package)
        if found and found.origin:  # read, not imported: that is what takes long
            digest.update(Path(found.origin).with_name("_version.py").read_bytes())
    here = Path(__file__).parent
    for source in sorted([*here.glob("*.py"), *(here.parent / "isa").glob("*.py")]):
        digest.update(source.read_bytes())
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', host()[1])}-{digest.hexdigest()[:16]}"


def folder() -> Path:
    return home() / "kernels"


def read(name: str) -> bytes | None:
    """The image or object file of that name; None if there is none that is sound."""
    path = folder() / key() / (name + SUFFIX)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    start = len(HEADER) + hashlib.sha256().digest_size
    if content[:start] == HEADER + _digest(name, content[start:]):
        return content[start:]
    remove(name)
    return None


def write(name: str, compiled: bytes) -> None:
    keep(folder() / key() / (name + SUFFIX), HEADER + _digest(name, compiled) + compiled)


def remove(name: str) -> None:
    with suppress(OSError):
        (folder() / key() / (name + SUFFIX)).unlink()


def _digest(name: str, compiled: bytes) -> bytes:
    return hashlib.sha256(f"{key()}/{name}/".encode() + compiled).digest()


def used() -> None:
    """Note that this key is in use, at most once an hour."""
    with suppress(OSError):
        path = folder() / key()
        if time.time() - path.stat().st_mtime > HOUR:
            os.utime(path)


def tidy() -> None:
    """Remove all but the folders that were used last, and what a killed process has left half written."""
    with suppress(OSError):
        os.utime(folder() / key())
        for kept in held()[KEPT:]:
            if not kept.current:
                shutil.rmtree(kept.path, ignore_errors=True)
        for path in (folder() / key()).glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > HOUR:
                path.unlink(missing_ok=True)


def clear() -> None:
    """Remove all. Processes that have loaded kernels keep theirs. Raises OSError."""
    if folder().exists():
        shutil.rmtree(folder())


@dataclass(frozen=True)
class Folder:
    """A key's kernels."""

    path: Path
    names: list[str]
    n_bytes: int
    used: float
    """Seconds since the epoch."""

    @property
    def current(self) -> bool:
        return self.path.name == key()


def held() -> list[Folder]:
    """Every key's kernels, the last used first."""
    try:
        paths = [path for path in folder().iterdir() if path.is_dir()]
    except OSError:
        return []
    found = []
    for path in paths:
        with suppress(OSError):
            files = [file for file in path.rglob("*") if file.is_file()]
            names = sorted(file.stem for file in files if file.suffix == SUFFIX)
            n_bytes = sum(file.stat().st_size for file in files)
            found.append(Folder(path, names, n_bytes, path.stat().st_mtime))
    return sorted(found, key=lambda kept: -kept.used)
