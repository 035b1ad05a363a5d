"""Zip archives, as numpy.savez and torch.save write them: members that are read in parts. Knows not what they mean.

An archive is not trusted: its list of members is bounded, each must lie in the file apart from every other, and what is
deflated is inflated only as far as it is asked for.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, FileIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from edgellm.arrays import U8
from edgellm.errors import CheckpointError, UnsupportedError

from .checkpoint import read_bytes, unreadable

MAX_DIRECTORY = 1 << 23
"""Bytes of the list of members: three times what the largest models take."""
_CHUNK = 1 << 16
_LOCAL = struct.Struct("<4s22xHH")
"""What stands before a member's data: a signature, then the lengths of its name and of extra fields."""
_ENCRYPTED = 1


@dataclass(frozen=True)
class Member:
    name: str
    size: int
    read: Callable[[int, int], U8]
    """read(begin, count) -> (count,) uint8; cheap from the front to the end, whatever the compression."""
    crc: int = 0

    def whole(self, limit: int) -> bytes:
        """All bytes, which must be at most `limit`. Raises CheckpointError, also where the checksum is another."""
        if self.size > limit:
            raise CheckpointError(f"{self.name!r} has {self.size} bytes; expected at most {limit}: it is damaged")
        data = self.read(0, self.size).tobytes()
        if zlib.crc32(data) != self.crc:
            raise CheckpointError(f"{self.name!r} does not match its checksum; fetch the file again")
        return data


def members(path: Path) -> dict[str, Member]:
    """What an archive holds, by name.

    Raises CheckpointError if the archive is damaged, UnsupportedError for encryption and rare compressions.
    """
    try:
        with _Bounded(FileIO(path)) as file, ZipFile(file) as archive:
            size = archive.start_dir
            infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
            spans = sorted((*_span(path, file, info), info.filename) for info in infos)
    except OSError as error:
        raise unreadable(path, error) from error
    except (BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise CheckpointError(f"{path} is a zip archive that cannot be read: {error}; fetch it again") from error
    _check_apart(path, spans, size)
    starts = {name: begin for begin, _, name in spans}
    if len(starts) < len(infos):
        raise CheckpointError(f"{path} holds a member twice; expected each name once: it is damaged")
    return {info.filename: _member(path, starts[info.filename], info) for info in infos}


class _Bounded(BufferedReader):
    """A file for zipfile, which reads the list of members at once, as large as the file says that it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise BadZipFile(f"its list of members takes {size} bytes, at most {MAX_DIRECTORY} are expected")
        return super().read(size)


def _span(path: Path, file: BufferedReader, info: ZipInfo) -> tuple[int, int]:
    """First byte of a member's data and the byte after its last."""
    if info.flag_bits & _ENCRYPTED or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise UnsupportedError(
            f"{path}: {info.filename!r} is encrypted or compressed by method {info.compress_type}; this version reads "
            "what is stored or deflated: save the weights again"
        )
    if info.compress_type == ZIP_STORED and info.compress_size != info.file_size:
        raise BadZipFile(f"{info.filename!r} is stored with {info.compress_size} bytes, but has {info.file_size}")
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    signature, name, extra = _LOCAL.unpack(header)
    if signature != b"PK\3\4":
        raise BadZipFile(f"{info.filename!r} is not where the list of members says")
    begin = info.header_offset + _LOCAL.size + name + extra
    return begin, begin + info.compress_size


def _check_apart(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """`spans` in ascending order; the list of members follows at byte `size`."""
    at = 0
    for begin, end, name in spans:
        if begin < at or end > size:
            raise CheckpointError(
                f"{path}: {name!r} takes the bytes {begin} to {end}; expected them from {at} on and before {size}: "
                "it is damaged"
            )
        at = end


def _member(path: Path, begin: int, info: ZipInfo) -> Member:
    stored = info.compress_type == ZIP_STORED
    read = partial(read_bytes, path, begin) if stored else _Inflater(path, begin, info).read
    return Member(info.filename, info.file_size, read, info.CRC)


class _Inflater:
    """A deflated member, as far as it was read: no file stays open meanwhile. Going back starts again."""

    def __init__(self, path: Path, begin: int, info: ZipInfo) -> None:
        self._path, self._name, self._begin = path, info.filename, begin
        self._compressed, self._size, self._crc = info.compress_size, info.file_size, info.CRC
        self._restart()

    def _restart(self) -> None:
        self._stream, self._next, self._pending = zlib.decompressobj(-zlib.MAX_WBITS), 0, b""
        self._at = self._sum = 0

    def read(self, begin: int, count: int) -> U8:
        if begin < self._at:
            self._restart()
        while self._at < begin:
            self._take(min(begin - self._at, _CHUNK))
        return np.frombuffer(self._take(count), np.uint8)

    def _take(self, count: int) -> bytes:
        pieces = []
        while count:
            piece = self._inflate(count)
            pieces.append(piece)
            count -= len(piece)
            self._at += len(piece)
            self._sum = zlib.crc32(piece, self._sum)
        if self._at == self._size and self._sum != self._crc:
            raise CheckpointError(f"{self._path}: {self._name!r} does not match its checksum; fetch it again")
        return b"".join(pieces)

    def _inflate(self, count: int) -> bytes:
        """At least one byte more, at most `count`."""
        piece = b""
        while not piece:
            if not self._pending and not self._stream.eof:
                size = min(_CHUNK, self._compressed - self._next)
                self._pending = read_bytes(self._path, self._begin, self._next, size).tobytes()
                self._next += size
            ended = not self._pending or self._stream.eof
            try:
                piece = self._stream.decompress(self._pending, count)
            except zlib.error as error:
                raise CheckpointError(f"{self._path}: {self._name!r} cannot be inflated: {error}") from error
            self._pending = self._stream.unconsumed_tail
            if ended and not piece:
                raise CheckpointError(
                    f"{self._path}: {self._name!r} ends after {self._at} bytes; expected {self._size}: it is damaged"
                )
        return piece
