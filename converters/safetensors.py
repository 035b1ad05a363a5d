"""Safetensors files: uint64 length of the header, JSON (name -> dtype, shape, first and last byte), the data.

A file is not trusted: see gguf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.errors import CheckpointError

from .checkpoint import MAX_DIMS, STORED_DTYPES, SourceTensor, is_computed, row_reader, unreadable, unsupported_type
from .json_file import MAX_BYTES, parse_object


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """Its tensors by name, without those that follow from a config.

    Raises CheckpointError if the file is damaged, UnsupportedError for numbers that this version does not read.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} announces a header of {length} bytes in a file of {size}; expected at "
                    f"most {MAX_BYTES}, and all in the file: it is damaged or incomplete"
                )
            header = parse_object(path, file.read(length))
    except OSError as error:
        raise unreadable(path, error) from error
    header.pop("__metadata__", None)
    spans = sorted((*_span(path, name, info), name) for name, info in header.items())
    _check_contiguous(path, spans, size - 8 - length)
    return {
        name: _tensor(path, name, header[name], 8 + length + begin) for begin, _, name in spans if not is_computed(name)
    }


def _span(path: Path, name: str, info: Any) -> tuple[int, int]:
    """First byte and byte after the last of a tensor, counted from the start of the data."""
    if not _is_described(info):
        raise CheckpointError(
            f"{path}: tensor {name!r} is described by {str(info)[:200]}; expected its dtype, its "
            "shape and two data_offsets"
        )
    begin, end = info["data_offsets"]
    if is_computed(name):
        return begin, end
    if info["dtype"] not in STORED_DTYPES:
        raise unsupported_type(path, name, info["dtype"])
    expected = math.prod(info["shape"]) * STORED_DTYPES[info["dtype"]].block_bytes
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the bytes {begin} to {end}; expected {expected} bytes for "
            f"{info['dtype']} of shape {tuple(info['shape'])}"
        )
    return begin, end


def _is_described(info: Any) -> bool:
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str):
        return False
    shape, offsets = info.get("shape"), info.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > MAX_DIMS or len(offsets) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in shape + offsets)


def _check_contiguous(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """`spans` in ascending order; raises CheckpointError for holes, overlaps, missing bytes and bytes left over."""
    at = 0
    for begin, end, name in spans:
        if begin != at:
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {begin} of the data; expected {at}, where "
                "the one before it ends"
            )
        at = end
    if at != size:
        raise CheckpointError(
            f"{path} has {size} bytes of data; expected {at}: it is damaged or incomplete, fetch it again"
        )


def _tensor(path: Path, name: str, info: Mapping[str, Any], offset: int) -> SourceTensor:
    type, shape = STORED_DTYPES[info["dtype"]], tuple(info["shape"])
    rows, cols = math.prod(shape[:-1]), shape[-1] if shape else 1
    return SourceTensor(name, shape, type, row_reader(path, offset, rows, cols * type.block_bytes))
