"""Writes GGUF files, version 3, as `gguf` reads them. Knows bytes and names, no model."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edgellm.arrays import U8
from edgellm.tensor_writer import TensorWriter

from .blocks import BlockType, row_bytes
from .gguf import ARRAY, BOOL, FLOAT32, INT32, STRING, TENSOR_TYPES, UINT32

ALIGNMENT = 32
_ELEMENTS = {"bool": BOOL, "int32": INT32, "float32": FLOAT32}


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    """As NumPy has it: (rows, cols) of a matrix, (size,) of a vector."""
    type: BlockType

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


class GGUFWriter(TensorWriter):
    """Metadata are truth values, integers (as UINT32), floats (as FLOAT32), texts, lists of texts or of integers (as
    INT32), and arrays of bool, int32 or float32."""

    def __init__(
        self, path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        super().__init__(path, {name: info.n_bytes for name, info in tensors.items()})
        self._metadata, self._tensors = metadata, tensors

    def _begin(self) -> None:
        self._file.write(self._header())
        self._pad()

    def _wrote(self, name: str, raw: U8) -> None:
        if not self._left[name]:
            self._pad()

    def _header(self) -> bytes:
        entries = [_text(key) + _value(value) for key, value in self._metadata.items()]
        infos, offset = [], 0
        for name, info in self._tensors.items():
            dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
            infos.append(_text(name) + dims + struct.pack("<IQ", TENSOR_TYPES.index(info.type.name), offset))
            offset += -(-info.n_bytes // ALIGNMENT) * ALIGNMENT
        return struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(entries)) + b"".join([*entries, *infos])

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list) and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    array = np.array(value, np.int32) if isinstance(value, list) else value
    elements: bytes = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return struct.pack("<IIQ", ARRAY, _ELEMENTS[array.dtype.name], len(array)) + elements
