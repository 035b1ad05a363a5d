"""Files of numpy.savez: a zip archive with a .npy file for each array, which is a short header and the values.

    header    "\\x93NUMPY", version uint8 uint8, length uint16 (from version 2 on uint32), text
    text      {'descr': '<f4', 'fortran_order': False, 'shape': (64, 64), }

A file is not trusted: see archive. The text is matched, not evaluated, and objects, which are pickles, are not read.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from edgellm.errors import CheckpointError, UnsupportedError

from .archive import Member, members
from .checkpoint import MAX_DIMS, STORED_DTYPES, SourceTensor, is_computed
from .strided import strided

SUFFIX = ".npy"
_MAX_HEADER = 10_000
_HEADER = re.compile(
    rb"\s*\{\s*'descr':\s*'([^']{1,40})',\s*'fortran_order':\s*(True|False),\s*"
    rb"'shape':\s*\(((?:\d{1,18}(?:,\s*|(?=\))))*)\),?\s*\}\s*"
)
_TYPES = {"<f4": "F32", "<f2": "F16", "|u1": "U8"}


def read_npz(path: Path) -> dict[str, SourceTensor]:
    """Its arrays by name, without those that follow from a config.

    Raises CheckpointError if the file is damaged, UnsupportedError for what is no array of float32 or float16.
    """
    found = members(path)
    others = [name for name in found if not name.endswith(SUFFIX)]
    if others:
        raise CheckpointError(f"{path} holds {others[0]!r}, which is no array; expected a file of numpy.savez")
    arrays = {name.removesuffix(SUFFIX): member for name, member in found.items()}
    return {name: _array(path, name, member) for name, member in arrays.items() if not is_computed(name)}


def _array(path: Path, name: str, member: Member) -> SourceTensor:
    descr, by_columns, shape, begin = _header(path, name, member)
    if descr not in _TYPES:
        raise UnsupportedError(
            f"{path}: array {name!r} is stored as {descr}; this version reads {', '.join(_TYPES)}: "
            "save it with .astype('float32')"
        )
    block_type = STORED_DTYPES[_TYPES[descr]]
    expected = begin + math.prod(shape) * block_type.block_bytes
    if member.size != expected:
        raise CheckpointError(f"{path}: array {name!r} has {member.size} bytes; expected {expected} for shape {shape}")
    return strided(name, shape, _strides(shape, by_columns), block_type, member.read, begin)


def _strides(shape: tuple[int, ...], by_columns: bool) -> tuple[int, ...]:
    """In values."""
    if by_columns:
        return _strides(shape[::-1], False)[::-1]
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _header(path: Path, name: str, member: Member) -> tuple[str, bool, tuple[int, ...], int]:
    """Type, whether columns and not rows are contiguous, shape, and where the values begin."""
    start = member.read(0, min(member.size, 12)).tobytes()
    width = 2 if start[6:7] == b"\1" else 4
    begin = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    text = member.read(8 + width, begin - 8 - width).tobytes() if begin <= min(member.size, _MAX_HEADER) else b""
    fields = _HEADER.fullmatch(text)
    shape = tuple(map(int, re.findall(rb"\d+", fields[3]))) if fields else ()
    if not start.startswith(b"\x93NUMPY") or not fields or len(shape) > MAX_DIMS:
        raise CheckpointError(
            f"{path}: array {name!r} starts with {(start + text)[:80]!r}; expected the header of a .npy file with "
            "one type and a shape"
        )
    return fields[1].decode("latin-1"), fields[2] == b"True", shape, begin
