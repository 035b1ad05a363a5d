"""The .edge file: a safetensors file whose matrices are tiles that kernels read in place; see docs/format.md.

`Writer` streams one, `EdgeFile` maps one; both sides of each rule stand in this file. Nothing here knows what an
architecture is: that the tensors are the right ones is for `load` to check.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from edgellm import quant
from edgellm.arrays import F32, U8
from edgellm.errors import EdgeFileError, UnsupportedError
from edgellm.tensor import Tensor
from edgellm.tensor_writer import TensorWriter

VERSION = "2"
READABLE = ("1", "2")
ALIGNMENT = 64
PAGE = 4096
MAX_HEADER = 64 << 20
TOKENIZER, TABLES = "tokenizer.json", "tokenizer.tables"
VECTOR_PAD = 16
_SUM_KEY, _NO_SUM = '"header_sha256":"', "0" * 64


@dataclass(frozen=True)
class ModelInfo:
    """What a .edge file says of its model, besides the tensors."""

    architecture: str
    config: Mapping[str, Any]
    recipe: str
    """The --format it was converted with."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    name: str
    license: str
    origin: str


class TensorSpec(NamedTuple):
    """What a tensor is, before it is written; see Tensor."""

    shape: tuple[int, ...]
    format: str
    pair: int = 0


class _Stored(NamedTuple):
    """How a tensor stands in the data section."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * {"U8": 1, "F16": 2, "F32": 4}[self.dtype]


def _stored(spec: TensorSpec) -> _Stored:
    """The stored form of a tensor: tiles of a matrix, a vector padded to a cache line."""
    shape, format, _ = spec
    if len(shape) == 1:
        return _Stored("F32", (-(-shape[0] // VECTOR_PAD) * VECTOR_PAD,))
    grid = quant.tile_grid(*shape)
    if format in ("f16", "f32"):
        return _Stored(format.upper(), (*grid, quant.TILE_COLS, quant.TILE_ROWS))
    return _Stored("U8", (*grid, quant.get(format).TILE_BYTES))


def pad_vector(values: F32) -> F32:
    """(size,) -> (size padded with zeros to a multiple of 16,)."""
    return np.pad(values, (0, -len(values) % VECTOR_PAD))


class Writer(TensorWriter):
    """`tensors` has every tensor in file order; `tokenizer_tables` are those of `bpe`, if there are any for this
    tokenizer."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        info: ModelInfo,
        tokenizer_json: bytes,
        tensors: Mapping[str, TensorSpec],
        tokenizer_tables: bytes | None = None,
    ) -> None:
        self._info, self._specs = info, dict(tensors)
        self._tokenizer = {TOKENIZER: tokenizer_json + b" " * (-len(tokenizer_json) % ALIGNMENT)}
        if tokenizer_tables is not None:
            self._tokenizer[TABLES] = tokenizer_tables
        self._stored = {name: _Stored("U8", (len(data),)) for name, data in self._tokenizer.items()}
        self._stored |= {name: _stored(spec) for name, spec in tensors.items()}
        self._sums = {name: hashlib.sha256() for name in self._stored}
        super().__init__(path, {name: stored.n_bytes for name, stored in self._stored.items()})

    def _begin(self) -> None:
        self._file.write(self._header())  # its size is final, its checksums are not
        for name, data in self._tokenizer.items():
            self.write(name, np.frombuffer(data, np.uint8))

    def _wrote(self, name: str, raw: U8) -> None:
        self._sums[name].update(raw.data)

    def _end(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())

    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": self._metadata()}
        offset = 0
        for name, stored in self._stored.items():
            end = offset + stored.n_bytes
            header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, end]}
            offset = end
        text = _dumps(header).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        digest = hashlib.sha256(text).hexdigest()
        return len(text).to_bytes(8, "little") + _with_sum(text, _NO_SUM, digest)

    def _metadata(self) -> dict[str, str]:
        """The header's strings. The header's own checksum goes first, so that no other text can stand for it."""
        tensors = {
            name: {**spec._asdict(), "sha256": self._sums[name].hexdigest()} for name, spec in self._specs.items()
        }
        return {
            "header_sha256": _NO_SUM,
            "format": "edge",
            "version": VERSION,
            "tensors": _dumps(tensors),
            **{_sum_key(name): self._sums[name].hexdigest() for name in self._tokenizer},
            **{key: value if isinstance(value, str) else _dumps(value) for key, value in vars(self._info).items()},
        }


def _sum_key(name: str) -> str:
    """Where the metadata has the checksum of the tokenizer or its tables."""
    return {TOKENIZER: "tokenizer_sha256", TABLES: "tokenizer_tables_sha256"}[name]


def _with_sum(header: bytes, old: str, new: str) -> bytes:
    """The header with its own checksum replaced."""
    return header.replace((_SUM_KEY + old).encode(), (_SUM_KEY + new).encode(), 1)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class _Entry(NamedTuple):
    """A tensor as the header describes it; the tokenizer and its tables have no spec."""

    begin: int
    end: int
    sha256: str
    spec: TensorSpec | None


class EdgeFile:
    """A .edge file, mapped read-only: `info`, `tensors` (views into the map), `tokenizer_json` and `tokenizer_tables`.

    Opening checks the header and every size in it, and reads no tensor; `verify` reads them all. Raises EdgeFileError
    for a damaged file or one of another kind, UnsupportedError for another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.n_bytes = os.fstat(file.fileno()).st_size
                self._read_header(file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror or error}") from error
        self._data: U8 = np.frombuffer(self._map, np.uint8)[self._data_start :]
        self.tensors = {name: self._tensor(name, entry) for name, entry in self._entries.items() if entry.spec}

    def _read_header(self, file: IO[bytes]) -> None:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, self.n_bytes - 8):
            raise self._error(f"header of {length} bytes in a file of {self.n_bytes}; not a .edge file, or cut short")
        self._data_start, raw = 8 + length, file.read(length)
        header = self._parse(raw)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != "edge":
            raise self._error("not a .edge file; 'edgellm convert' makes them from other weights")
        if metadata.get("version") not in READABLE:
            raise UnsupportedError(
                f"{self.path}: .edge version {metadata.get('version')!r}; this edgellm reads {' and '.join(READABLE)}: "
                f"convert the model again, or update edgellm"
            )
        self.fingerprint = str(metadata.get("header_sha256"))
        if hashlib.sha256(_with_sum(raw, self.fingerprint, _NO_SUM)).hexdigest() != self.fingerprint:
            raise self._error("header does not match its checksum; the file is damaged: convert or download it again")
        try:
            self.info, self._entries = _read_info(metadata), _read_entries(metadata, header)
            self._check_places()
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._error(f"header has a malformed entry ({error!r}); convert the model again") from None

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._error(f"header is not JSON ({error}); not a .edge file, or damaged") from None
        if not isinstance(header, dict):
            raise self._error("header is not a JSON object; not a .edge file, or damaged")
        return header

    def _check_places(self) -> None:
        """Tensors must follow each other without holes, aligned, up to the end of the file."""
        at = 0
        for name, entry in sorted(self._entries.items(), key=lambda item: item[1].begin):
            if entry.begin != at or entry.end <= at or (self._data_start + entry.end) % ALIGNMENT:
                raise self._error(f"tensor {name!r} stands at bytes {entry.begin} to {entry.end}; expected {at} on")
            at = entry.end
        if self._data_start % ALIGNMENT or self._data_start + at != self.n_bytes:
            raise self._error(
                f"{self.n_bytes} bytes; its header describes {self._data_start + at}: cut short or padded"
            )

    def _tensor(self, name: str, entry: _Entry) -> Tensor:
        assert entry.spec is not None
        shape, format, pair = entry.spec
        raw = self._data[entry.begin : entry.end]
        data = raw.view(np.float32) if len(shape) == 1 else raw.reshape(*quant.tile_grid(*shape), -1)
        return Tensor(name, shape, format, data, pair)

    @property
    def tokenizer_json(self) -> bytes:
        entry = self._entries[TOKENIZER]
        return self._data[entry.begin : entry.end].tobytes()

    @property
    def tokenizer_tables(self) -> U8 | None:
        """For `bpe`, a view into the map; None where the file has none."""
        entry = self._entries.get(TABLES)
        return None if entry is None else self._data[entry.begin : entry.end]

    def verify(self) -> None:
        """Read everything and compare checksums; raises EdgeFileError with the first tensor that differs."""
        for name, entry in self._entries.items():
            if hashlib.sha256(self._data[entry.begin : entry.end].data).hexdigest() != entry.sha256:
                raise self._error(
                    f"tensor {name!r} does not match its checksum; the file is damaged: convert or download it again"
                )

    def close(self) -> None:
        """Unmap the file; arrays that the caller still holds keep the map alive until they are gone."""
        self.tensors, self._data = {}, np.empty(0, np.uint8)
        with suppress(BufferError):
            self._map.close()

    def _error(self, text: str) -> EdgeFileError:
        return EdgeFileError(f"{self.path}: {text}")


def _read_info(metadata: Mapping[str, str]) -> ModelInfo:
    values: dict[str, Any] = {field.name: metadata[field.name] for field in fields(ModelInfo)}
    values |= {key: json.loads(values[key]) for key in ("config", "bos_id", "eos_ids")}
    values["eos_ids"] = tuple(int(id) for id in values["eos_ids"])
    if values["chat_template"] == "null":
        values["chat_template"] = None
    return ModelInfo(**values)


def _read_entries(metadata: Mapping[str, str], header: Mapping[str, Any]) -> dict[str, _Entry]:
    """Every tensor, where its stored form is what its shape and format ask for; raises ValueError where not."""
    tensors = json.loads(metadata["tensors"], object_pairs_hook=_unique)
    own = [TOKENIZER, *([TABLES] if _sum_key(TABLES) in metadata else [])]
    if {*own, *tensors} != set(header):
        raise ValueError(f"tensors listed only once: {sorted({*own, *tensors} ^ set(header))[:4]}")
    entries = {}
    for name in own:
        begin, end = _integers(header[name]["data_offsets"])
        entries[name] = _Entry(begin, end, metadata[_sum_key(name)], None)
    for name, said in tensors.items():
        spec = TensorSpec(_integers(said["shape"]), said["format"], *_integers([said["pair"]]))
        begin, end = _integers(header[name]["data_offsets"])
        _check_spec(name, spec)
        stored = _stored(spec)
        if (header[name]["dtype"], _integers(header[name]["shape"]), end - begin) != (*stored, stored.n_bytes):
            raise ValueError(
                f"tensor {name!r} is stored as {header[name]}; expected {stored} of {stored.n_bytes} bytes"
            )
        entries[name] = _Entry(begin, end, said["sha256"], spec)
    return entries


def _check_spec(name: str, spec: TensorSpec) -> None:
    shape, format, pair = spec
    sound = len(shape) in (1, 2) and all(0 < n < 1 << 32 for n in shape) and quant.is_known(format)
    if not sound or (len(shape) == 1 and (format, pair) != ("f32", 0)):
        raise ValueError(f"tensor {name!r} has shape {shape} and format {format!r}")
    if pair and (pair < 0 or pair % quant.TILE_ROWS or shape[0] % (2 * pair)):
        raise ValueError(f"tensor {name!r} of {shape[0]} rows is paired by {pair}")


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{values!r} stands for a list of integers")
    return tuple(values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
