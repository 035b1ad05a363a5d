"""A .edge file -> a GGUF file that llama.cpp runs: the same values, bit for bit, a few rows at a time."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import numpy as np

from edgellm import architectures, quant
from edgellm.architectures import Architecture
from edgellm.arrays import F32, U8, Array
from edgellm.errors import UnsupportedError
from edgellm.loading import LoadedFile, open_model
from edgellm.tensor import Tensor

from .blocks import TYPES, BlockType, decode_rows, encode_rows, type_of
from .gguf import ROPE_TENSORS
from .gguf_vocabulary import vocabulary_to_gguf
from .gguf_writer import GGUFWriter, TensorInfo
from .naming import parts, places
from .report import Report, account
from .rows import CHUNK, joined, row_order


def export(source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: bool = True) -> Report:
    """Write a .edge file to the GGUF file `target`, which appears only when it is complete.

    Raises UnsupportedError for what cannot be said in GGUF, EdgeFileError for a file that is damaged.
    """
    loaded = open_model(source)
    report = Report(str(loaded.file.path), str(target), loaded.file.info.architecture, loaded.file.info.recipe)
    try:
        with report.written():
            loaded.file.verify()
            _export(loaded, report, progress)
    finally:
        loaded.file.close()
    return report


def _export(loaded: LoadedFile, report: Report, progress: bool) -> None:
    info, tensors = loaded.file.info, _tensors(loaded)
    said = _hyperparameters(loaded, tensors)
    extra = {f"{name}.weight": np.array(said.pop(name), np.float32) for name in ROPE_TENSORS if name in said}
    infos = {name: TensorInfo(values.shape, TYPES["F32"]) for name, values in extra.items()}
    infos |= {name: TensorInfo(tensor.shape, tensor.type) for name, tensor in tensors.items()}
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    with (
        GGUFWriter(report.target, _metadata(loaded, said), infos) as writer,
        click.progressbar(length=total, label=f"Exporting {info.name}", file=sys.stderr, hidden=not progress) as bar,
    ):
        for name, values in extra.items():
            writer.write(name, values.view(np.uint8))
        for name, tensor in tensors.items():
            row = report.row(tensor.type.name)
            for values, raw in tensor.pieces():
                account(row, values, decode_rows(tensor.type, raw), raw.nbytes, name)
                writer.write(name, raw)
                bar.update(values.size)


@dataclass
class _Exported:
    """A tensor of the GGUF file, and where in the .edge file its rows are; a vector has rows of one value."""

    shape: tuple[int, ...]
    sources: list[Tensor]
    source: Array
    """(rows,): which of the sources..."""
    row: Array
    """(rows,): ...and which of its rows, as they are stored."""

    @property
    def cols(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def type(self) -> BlockType:
        formats = {source.format for source in self.sources}
        return type_of(formats.pop(), self.cols) if len(formats) == 1 else TYPES["F32"]

    def pieces(self) -> Iterator[tuple[F32, U8]]:
        """Some rows at a time: (rows, cols) values, and (rows, row bytes) of the type."""
        step = max(quant.TILE_ROWS, CHUNK // self.cols)
        for first in range(0, len(self.row), step):
            source, row = self.source[first : first + step], self.row[first : first + step]
            used = np.unique(source)
            taken = [_take(self.sources[i], row[source == i], self.type.keep) for i in used]
            order = np.argsort(np.concatenate([np.flatnonzero(source == i) for i in used]))
            quantized = joined(taken, order)
            yield quant.get(self.type.keep).dequantize(quantized), encode_rows(self.type, quantized)


def _take(tensor: Tensor, rows: Array, format: str) -> quant.Quantized:
    """Some stored rows of a tensor, in its own format or in f32."""
    if len(tensor.shape) == 1:
        return quant.Quantized(tensor.data[rows, None])
    blocks, at = np.unique(rows // quant.TILE_ROWS, return_inverse=True)
    own, index = quant.get(tensor.format), at * quant.TILE_ROWS + rows % quant.TILE_ROWS
    unpacked = own.unpack(tensor.data[blocks], len(blocks) * quant.TILE_ROWS, tensor.shape[1])
    picked = quant.Quantized(*(None if array is None else array[index] for array in unpacked))  # type: ignore[arg-type]
    return picked if tensor.format == format else quant.Quantized(own.dequantize(picked))


def _tensors(loaded: LoadedFile) -> dict[str, _Exported]:
    stored, result = _stored(loaded), dict[str, _Exported]()
    for part, place in places(loaded.architecture, loaded.config, loaded.architecture.GGUF_NAMES).items():
        n_rows = math.prod(place.shape[:-1]) if len(place.shape) > 1 else place.shape[0]
        whole = result.setdefault(
            place.tensor, _Exported(place.shape, [], np.zeros(n_rows, np.intp), np.zeros(n_rows, np.intp))
        )
        tensor, rows = stored[part]
        theirs = slice(None) if place.rows is None else place.rows
        whole.source[theirs], whole.row[theirs] = len(whole.sources), rows
        whole.sources.append(tensor)
    return result


def _stored(loaded: LoadedFile) -> dict[str, tuple[Tensor, Array]]:
    """By tensor of the architecture's tables: the one of the file that holds its rows, and where these are, in GGUF's
    order."""
    result = dict[str, tuple[Tensor, Array]]()
    for name, made_of in parts(loaded.architecture, loaded.config).items():
        tensor = loaded.file.tensors[name]
        turned = name.split(".")[-1].removesuffix("_bias") in loaded.architecture.GGUF_INTERLEAVED
        head_dim = loaded.config.head_dim if turned else 0
        order = row_order(tensor.shape[0] // len(made_of), tensor.pair, len(made_of), head_dim)
        rows_of_parts = np.argsort(order).reshape(len(made_of), -1)
        result |= {part: (tensor, rows) for part, rows in zip(made_of, rows_of_parts, strict=True)}
    return result


def _hyperparameters(loaded: LoadedFile, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What to_gguf says of the config; raises UnsupportedError if reading that gives another one."""
    architecture, config = loaded.architecture, loaded.config
    name = loaded.file.info.architecture
    said: dict[str, Any] = _to_gguf(name, architecture)(config)
    read = {**said, "architecture": _gguf_name(name, architecture), "tensors": tensors.keys()}
    again = replace(architecture.Config.from_gguf(read), tie_embeddings=config.tie_embeddings)
    if "rope_freqs" in said:
        config = replace(config, rope_scaling={"type": "factors", "factors": said["rope_freqs"]})
    ours, theirs = (_rounded(_facts(architecture, each)) for each in (config, again))
    if lost := [f"{key} = {value}" for key, value in ours.items() if value != theirs[key]]:
        raise UnsupportedError(f"the model has {', '.join(lost)[:300]}, which a GGUF file of it cannot say")
    return said


def _facts(architecture: Architecture, config: Any) -> dict[str, Any]:
    """The fields of a config, and the windows in place of the fields that say in one of several ways what they are."""
    fields = {key: value for key, value in asdict(config).items() if key not in ("sliding_window", "layer_types")}
    return {**fields, "windows": [cache.window for cache in architecture.caches(config)]}


def _to_gguf(name: str, architecture: Architecture) -> Any:
    if not hasattr(architecture, "to_gguf"):
        known = [other for other in architectures.names() if hasattr(architectures.get(other), "to_gguf")]
        raise UnsupportedError(f"architecture {name!r} cannot be exported; this version exports {', '.join(known)}")
    return architecture.to_gguf


def _gguf_name(name: str, architecture: Architecture) -> str:
    return str(getattr(architecture, "GGUF_ARCHITECTURE", name))


def _rounded(value: Any) -> Any:
    """With the numbers that GGUF holds."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _metadata(loaded: LoadedFile, said: Mapping[str, Any]) -> dict[str, Any]:
    info = loaded.file.info
    name = _gguf_name(info.architecture, loaded.architecture)
    return {
        "general.architecture": name,
        "general.name": info.name,
        "general.license": info.license,
        "general.source.url": info.origin,
        "general.quantization_version": 2,
        **{f"{name}.{key}": value for key, value in said.items()},
        **vocabulary_to_gguf(loaded.file.tokenizer_json, info.bos_id, info.eos_ids, loaded.config.vocab_size),
        **({"tokenizer.chat_template": info.chat_template} if info.chat_template else {}),
    }
