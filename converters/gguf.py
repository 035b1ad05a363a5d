"""GGUF files, versions 2 and 3, whole or in shards. Knows bytes and names; gguf_tokenizer knows what tokens mean.

    header    "GGUF", version uint32, tensors uint64, metadata entries uint64
    entry     key, type uint32, value; an array is its elements' type uint32, their number uint64, the elements
    tensor    name, dimensions uint32, each dimension uint64 (columns first), type uint32, offset uint64
    data      from the next multiple of general.alignment on; offsets count from here

Text is a uint64 length and UTF-8, numbers are little-endian. A file is not trusted: every size is a Python integer,
which cannot wrap around, and is held against the bytes that are there before anything is read or allocated.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgellm import architectures
from edgellm.architectures import Architecture
from edgellm.errors import CheckpointError, UnsupportedError

from .blocks import TYPES, BlockType, decode_rows, row_bytes
from .checkpoint import (
    Checkpoint,
    SourceTensor,
    check_rope_type,
    check_vocabulary,
    row_reader,
    unreadable,
)
from .gguf_tokenizer import tokenizer_from_gguf
from .naming import match_tensors

MAX_HEADER = 1 << 26
"""Bytes before the data; the largest vocabularies take a quarter of it."""
MAX_STRINGS = 1 << 21
"""Texts in arrays, in a whole file: a Python string takes some sixty bytes even for two letters."""
MAX_ENTRIES = 1 << 16
"""Metadata entries, and tensors."""
MAX_ALIGNMENT = 1 << 16
MAX_KEY = (1 << 16) - 1
MAX_TENSOR_NAME = 64
MAX_HYPERPARAMETER = 1 << 10
"""Characters or elements of a value that the architecture reads."""

ROPE_TENSORS = ("rope_freqs", "rope_factors_short", "rope_factors_long")
"""Hyperparameters that GGUF has as tensors: divisors of RoPE's frequencies."""

UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
# Text, because the formatter would give each word of a list its own line.
_VALUE_NAMES = (  # noqa: SIM905
    "UINT8 INT8 UINT16 INT16 UINT32 INT32 FLOAT32 BOOL STRING ARRAY UINT64 INT64 FLOAT64"
).split()
_NUMBERS = {
    kind: struct.Struct("<" + code)
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True)
}

# What other programs read these as. A file that stores them otherwise was made to mislead a reader that does not look.
_STORED_AS = {
    "general.alignment": (UINT32,),
    "general.architecture": (STRING,),
    "tokenizer.chat_template": (STRING,),
    "split.no": (UINT16,),
    "split.count": (UINT16,),
    "split.tensors.count": (INT32,),
    "tokenizer.ggml.tokens": (ARRAY, STRING),
    "tokenizer.ggml.merges": (ARRAY, STRING),
    "tokenizer.ggml.scores": (ARRAY, FLOAT32),
    "tokenizer.ggml.token_type": (ARRAY, INT32),
}

TENSOR_TYPES = (  # noqa: SIM905
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 "
    "IQ4_NL_8_8 MXFP4 NVFP4 Q1_0"
).split()

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def read_gguf(path: Path) -> Checkpoint:
    """Open a model; of several shards any one will do.

    Raises CheckpointError for a damaged file, UnsupportedError for a sound one that this version cannot run.
    """
    file = GGUFFile(path)
    metadata, found = file.metadata, dict(file.tensors)
    if metadata.get("general.type") == "adapter":
        raise CheckpointError(f"{path} is an adapter; expected a model: give the adapter to --lora")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or len(name) > MAX_TENSOR_NAME:
        raise CheckpointError(f"{path} does not say its architecture; expected it in general.architecture")
    ours = architectures.named_in_gguf(name)
    architecture = architectures.get(ours)
    if not found:
        raise CheckpointError(f"{path} holds a vocabulary and no weights; expected a model: choose another file")
    settings = _hyperparameters(file, name, architecture) | _rope_factors(path, found)
    config = architecture.Config.from_gguf({**settings, "architecture": name, "tensors": found.keys()})
    config = replace(config, tie_embeddings=architecture.GGUF_NAMES["output"] not in found)
    tensors = match_tensors(path, architecture, config, architecture.GGUF_NAMES, found)
    tokenizer = tokenizer_from_gguf(metadata)
    check_vocabulary(path, tokenizer.n_tokens, config.vocab_size)
    return Checkpoint(
        path=str(path),
        architecture=ours,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        quantized=any(part.type.block_size > 1 for parts in tensors.values() for part in parts),
        kind="GGUF file",
        interleaved=tuple(architecture.GGUF_INTERLEAVED),
        chat_template=metadata.get("tokenizer.chat_template"),
        metadata=_said_of_itself(path, metadata),
    )


def _hyperparameters(file: GGUFFile, name: str, architecture: Architecture) -> dict[str, Any]:
    """The entries of the architecture, without its prefix."""
    prefix, result = name + ".", dict[str, Any]()
    for key, value in file.metadata.items():
        if not key.startswith(prefix):
            continue
        if isinstance(value, (str, list, np.ndarray)) and len(value) > MAX_HYPERPARAMETER:
            raise CheckpointError(
                f"{file.path}: {key} has a length of {len(value)}; expected at most "
                f"{MAX_HYPERPARAMETER}: the file is damaged"
            )
        result[key[len(prefix) :]] = value.tolist() if isinstance(value, np.ndarray) else value
    check_rope_type(file.path, result.get("rope.scaling.type"))
    embedding = file.tensors.get(str(architecture.GGUF_NAMES["embed"]))
    vocab_size = embedding.shape[0] if embedding else len(file.metadata.get("tokenizer.ggml.tokens", ()))
    return {"vocab_size": vocab_size, **result}


def _rope_factors(path: Path, found: dict[str, SourceTensor]) -> dict[str, list[float]]:
    """The ROPE_TENSORS: taken out of `found`, and given as hyperparameters."""
    result = {}
    for name in ROPE_TENSORS:
        tensor = found.pop(f"{name}.weight", None)
        if tensor is None:
            continue
        if len(tensor.shape) != 1 or tensor.shape[0] > MAX_HYPERPARAMETER:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} has the shape {tensor.shape}; expected at most {MAX_HYPERPARAMETER} "
                "numbers"
            )
        result[name] = [float(factor) for factor in decode_rows(tensor.type, tensor.read(0, 1))[0]]
    return result


def _said_of_itself(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    keys = {"name": ("general.name",), "license": ("general.license",), "source": ("general.source.url", "general.url")}
    said = {"source": path.name}
    for ours, theirs in keys.items():
        texts = [metadata[key] for key in theirs if isinstance(metadata.get(key), str) and metadata[key]]
        said |= {ours: texts[0]} if texts else {}
    return said


class GGUFFile:
    """What a GGUF file holds, its shards taken together. Tensors are read when asked for.

    Raises CheckpointError or UnsupportedError, as read_gguf.
    """

    path: Path
    metadata: dict[str, Any]
    """Numbers, texts, lists of text, and arrays (size,) of numbers; of the first shard."""
    tensors: dict[str, SourceTensor]
    """By the file's names; empty if it holds only a vocabulary."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata, self.tensors = _parse(self.path)
        if "split.count" in self.metadata:
            self._join(_shards(self.path, self.metadata["split.count"]))

    def _join(self, shards: list[Path]) -> None:
        parsed = [(self.metadata, self.tensors) if path == self.path else _parse(path) for path in shards]
        self.metadata, self.tensors = parsed[0][0], {}
        for number, (path, (metadata, tensors)) in enumerate(zip(shards, parsed, strict=True)):
            place = metadata.get("split.no"), metadata.get("split.count")
            if place != (number, len(shards)):
                raise CheckpointError(
                    f"{path} says that it is shard {place[0]} of {place[1]}, counted from 0; "
                    f"expected {number} of {len(shards)}: it was renamed, or is another model's"
                )
            twice = sorted(self.tensors.keys() & tensors.keys())
            if twice:
                raise CheckpointError(f"{path} holds tensors that an earlier shard has: {', '.join(twice)}")
            self.tensors |= tensors
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise CheckpointError(
                f"the shards of {shards[0]} hold {len(self.tensors)} tensors; expected {total}, "
                "from split.tensors.count: are they of one model?"
            )


def _shards(path: Path, count: int) -> list[Path]:
    """Every shard in order; raises CheckpointError with the names of those that are not there."""
    if count <= 1:
        return [path]
    name = _SHARD.fullmatch(path.name)
    if not name or int(name[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} shards, but its name does not say which; expected a name that "
            f"ends in -00001-of-{count:05}.gguf: give the shards their names back"
        )
    shards = [path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{path} is one of {count} shards; expected beside it, but missing: {', '.join(missing)}")
    return shards


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, SourceTensor]]:
    """Metadata and tensors of one file."""
    try:
        with open(path, "rb") as file:
            reader = _Reader(file, path)
            n_tensors, n_entries = _header(reader)
            metadata = _metadata(reader, n_entries)
            return metadata, _tensors(reader, n_tensors, _alignment(reader, metadata))
    except OSError as error:
        raise unreadable(path, error) from error


class _Reader:
    """Takes bytes from the front of a file, never more than are there."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path, self.at = path, 0
        self.size = file.seek(0, 2)
        self._limit = min(self.size, MAX_HEADER)
        self._strings = MAX_STRINGS
        file.seek(0)
        self._read = file.read

    def damaged(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def take(self, count: int, what: str) -> bytes:
        self.expect_room(count, what)
        data = self._read(count)
        if len(data) != count:
            raise self.damaged(f"{what} went away while the file was read; wait until it is complete and try again")
        self.at += count
        return data

    def expect_room(self, count: int, what: str) -> None:
        """Raise CheckpointError unless that many bytes can follow."""
        if count <= self._limit - self.at:
            return
        if self.size > self._limit:
            raise self.damaged(
                f"{what} leads past byte {MAX_HEADER}; expected the data to start before: the file is damaged"
            )
        raise self.damaged(
            f"the file ends in {what}: {count} bytes expected at byte {self.at}, "
            f"{self._limit - self.at} found; it is damaged or incomplete, fetch it again"
        )

    def number(self, code: struct.Struct, what: str) -> Any:
        return code.unpack(self.take(code.size, what))[0]

    def text(self, what: str, limit: int = MAX_HEADER) -> str:
        length = int.from_bytes(self.take(8, what), "little")
        if length > limit:
            raise self.damaged(f"{what} is {length} bytes long; expected at most {limit}: the file is damaged")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8 text; the file is damaged") from error

    def texts(self, count: int, what: str) -> list[str]:
        self.expect_room(8 * count, what)
        self._strings -= count
        if self._strings < 0:
            raise self.damaged(f"{what} has {count} texts; expected at most {MAX_STRINGS} in a file")
        return [self.text(what) for _ in range(count)]


_COUNT, _TYPE = struct.Struct("<Q"), struct.Struct("<I")


def _header(reader: _Reader) -> tuple[int, int]:
    """Number of tensors and of metadata entries."""
    magic = reader.take(4, "the magic number")
    if magic != b"GGUF":
        raise reader.damaged(f"the file starts with {magic!r}; expected b'GGUF': it is not a GGUF file")
    version = reader.number(_TYPE, "the version")
    if version not in (2, 3):
        raise _unsupported_version(reader.path, version)
    n_tensors = reader.number(_COUNT, "the number of tensors")
    n_entries = reader.number(_COUNT, "the number of metadata entries")
    for count, what in ((n_tensors, "tensors"), (n_entries, "metadata entries")):
        if count > MAX_ENTRIES:
            raise reader.damaged(f"the header announces {count} {what}; expected at most {MAX_ENTRIES}: it is damaged")
    # The shortest entry is an empty key and a byte, the shortest tensor an empty name and one dimension.
    reader.expect_room(n_entries * 13 + n_tensors * 32, f"{n_entries} metadata entries and {n_tensors} tensors")
    return n_tensors, n_entries


def _unsupported_version(path: Path, version: int) -> UnsupportedError:
    if version and version & 0xFFFF == 0:
        return UnsupportedError(f"{path}: the file is big-endian; this version reads little-endian GGUF: fetch one")
    return UnsupportedError(
        f"{path}: the file is GGUF version {version}; this version reads 2 and 3: "
        f"{'fetch a newer file of the model' if version < 2 else 'is there a newer edgellm'}?"
    )


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata = dict[str, Any]()
    for i in range(count):
        key = reader.text(f"the key of metadata entry {i}", MAX_KEY)
        if key in metadata:
            raise reader.damaged(f"metadata {key!r} stands there twice; expected each key once")
        metadata[key] = _value(reader, key)
    return metadata


def _value(reader: _Reader, key: str) -> Any:
    what = f"metadata {key!r}"
    stored = [_value_type(reader, what)]
    if stored[0] == ARRAY:
        stored.append(_value_type(reader, what))
    expected = _STORED_AS.get(key, stored)
    if list(expected) != stored:
        raise reader.damaged(f"{what} is stored as {_described(stored)}; expected {_described(expected)}")
    if stored[0] == ARRAY:
        return _array(reader, stored[1], what)
    if stored[0] == STRING:
        return reader.text(what)
    value = reader.number(_NUMBERS[stored[0]], what)
    return bool(_checked_truth(reader, value, what)) if stored[0] == BOOL else value


def _value_type(reader: _Reader, what: str) -> int:
    kind: int = reader.number(_TYPE, what)
    if kind >= len(_VALUE_NAMES):
        raise reader.damaged(f"{what} has a value of type {kind}; expected 0 to {len(_VALUE_NAMES) - 1}")
    return kind


def _described(stored: Sequence[int]) -> str:
    return " of ".join(_VALUE_NAMES[kind] for kind in stored)


def _array(reader: _Reader, kind: int, what: str) -> Any:
    if kind == ARRAY:
        raise UnsupportedError(
            f"{reader.path}: {what} is an array of arrays; this version reads only those of numbers or text"
        )
    count = reader.number(_COUNT, what)
    if kind == STRING:
        return reader.texts(count, what)
    dtype = np.dtype(_NUMBERS[kind].format)
    values = np.frombuffer(reader.take(count * dtype.itemsize, what), dtype)
    return values if kind != BOOL else _checked_truth(reader, values, what).astype(np.bool_)


def _checked_truth(reader: _Reader, value: Any, what: str) -> Any:
    if np.max(value, initial=0) > 1:
        raise reader.damaged(f"{what} has the truth value {np.max(value)}; expected 0 or 1")
    return value


def _alignment(reader: _Reader, metadata: Mapping[str, Any]) -> int:
    alignment: int = metadata.get("general.alignment", 32)
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise reader.damaged(f"general.alignment is {alignment}; expected a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _tensors(reader: _Reader, count: int, alignment: int) -> dict[str, SourceTensor]:
    """By name; each is known to lie in the file, apart from every other."""
    infos = [_tensor_info(reader, i, alignment) for i in range(count)]
    start = -(-reader.at // alignment) * alignment
    tensors, spans = dict[str, SourceTensor](), list[tuple[int, int, str]]()
    for name, shape, block_type, offset in infos:
        if name in tensors:
            raise reader.damaged(f"tensor {name!r} stands there twice; expected each name once")
        rows, size, begin = math.prod(shape[:-1]), row_bytes(block_type, shape[-1]), start + offset
        spans.append((begin, begin + rows * size, name))
        tensors[name] = SourceTensor(name, shape, block_type, row_reader(reader.path, begin, rows, size))
    _check_spans(reader, sorted(spans))
    return tensors


def _tensor_info(reader: _Reader, i: int, alignment: int) -> tuple[str, tuple[int, ...], BlockType, int]:
    """Name, shape as NumPy has it, type, offset."""
    name = reader.text(f"the name of tensor {i}", MAX_TENSOR_NAME)
    what = f"tensor {name!r}"
    n_dims = reader.number(_TYPE, what)
    if not 1 <= n_dims <= 4:
        raise reader.damaged(f"{what} has {n_dims} dimensions; expected 1 to 4")
    dims = struct.unpack(f"<{n_dims}Q", reader.take(8 * n_dims, what))
    block_type = _tensor_type(reader, what)
    offset = reader.number(_COUNT, what)
    if min(dims) < 1:
        raise reader.damaged(f"{what} has the dimensions {dims}; expected each to be 1 or more")
    if dims[0] % block_type.block_size:
        raise reader.damaged(
            f"{what} has rows of {dims[0]} values; expected a multiple of {block_type.block_size}, "
            f"as {block_type.name} stores them"
        )
    if offset % alignment:
        raise reader.damaged(f"{what} has the offset {offset}; expected a multiple of the alignment, {alignment}")
    return name, dims[::-1], block_type, offset


def _tensor_type(reader: _Reader, what: str) -> BlockType:
    number = reader.number(_TYPE, what)
    if number >= len(TENSOR_TYPES):
        raise reader.damaged(
            f"{what} has the type {number}; expected one of GGUF's, up to {len(TENSOR_TYPES) - 1}: "
            "the file is damaged, or newer than this version"
        )
    name = TENSOR_TYPES[number]
    if name not in TYPES:
        raise UnsupportedError(
            f"{reader.path}: {what} is stored as {name}; this version reads {', '.join(TYPES)}: "
            "choose a file with one of these"
        )
    return TYPES[name]


def _check_spans(reader: _Reader, spans: list[tuple[int, int, str]]) -> None:
    """`spans` in ascending order: first byte, byte after the last, name."""
    for begin, end, name in spans:
        if end > reader.size:
            raise reader.damaged(
                f"tensor {name!r} takes the bytes {begin} to {end}, but the file ends at "
                f"{reader.size}; it is damaged or incomplete, fetch it again"
            )
    for i in range(1, len(spans)):
        if spans[i][0] < spans[i - 1][1]:
            raise reader.damaged(
                f"the tensors {spans[i - 1][2]!r} and {spans[i][2]!r} overlap; expected each to have "
                "its own bytes: the file is damaged"
            )
