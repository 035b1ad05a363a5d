"""Trained weights of other formats -> a .edge file, and back to GGUF; a few rows of one tensor at a time."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import numpy as np

from edgellm import architectures, bpe, quant
from edgellm.arrays import F32, U8, Array
from edgellm.errors import ArgumentError, CheckpointError, ModelNotFoundError
from edgellm.file import ModelInfo, TensorSpec, Writer, pad_vector

from .adapter import is_adapter, merged, open_adapter, read_adapter
from .blocks import decode_rows, repack_rows
from .checkpoint import Checkpoint, SourceTensor, errors_about
from .gguf import read_gguf
from .gguf_export import export
from .huggingface import read_huggingface
from .llama2c import read_llama2c
from .report import Report, Row, account
from .rows import CHUNK, joined, row_order
from .weights import MARKS, kind_of

__all__ = [
    "FORMATS", "Report", "Row", "convert", "export", "is_adapter", "open_adapter", "read", "read_adapter",
]  # fmt: skip

FORMATS = ("keep", *quant.names())


def read(source: str | os.PathLike[str], tokenizer: Path | None = None, names: Path | None = None) -> Checkpoint:
    """Open a checkpoint by what it is, not by what it is called.

    `tokenizer` is one of llama2.c's; `names` is a map of tensor names, see name_map. Raises ModelNotFoundError if
    nothing is there, UnsupportedError for another kind of file, CheckpointError for a damaged one.
    """
    path = Path(source).absolute()  # whose folder, unlike ".", is in no other words of an error
    with errors_about(path):
        return _reader(path, tokenizer, names)(path)


def _reader(path: Path, tokenizer: Path | None, names: Path | None) -> Callable[[Path], Checkpoint]:
    own = _with_own_config(path) if tokenizer is None else partial(read_llama2c, tokenizer=tokenizer)
    if own is None:
        return partial(read_huggingface, names=names)
    if names is not None:
        raise ArgumentError(f"the tensors of {path.name} have the names of its format; expected no map of names")
    return own


def _with_own_config(path: Path) -> Callable[[Path], Checkpoint] | None:
    """The reader of a file that has its own config; None for folders, and files of weights beside a config.json."""
    if path.is_dir():
        return None
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        start = file.read(max(map(len, MARKS)))
    if start.startswith(b"GGUF"):
        return read_gguf
    if path.suffix == ".bin" and not start.startswith(MARKS):  # llama2.c has none
        return read_llama2c
    kind_of(path)
    return None


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | None = None,
    name: str | None = None,
    license: str | None = None,
    origin: str | None = None,
    tokenizer: Path | None = None,
    names: Path | None = None,
    adapters: Sequence[tuple[str | os.PathLike[str], float]] = (),
    progress: bool = True,
) -> Report:
    """Write `source` to the .edge file `target`, which appears only when it is complete.

    With `progress`, stderr tells what was found, and how far it is.

    `format` is a weight format, or "keep": what each tensor has, as closely as there is a format for it. By default
    quantized sources are kept, ternary ones become q2t, and others q4m. The matrix that computes the logits stays at 8
    bits in formats of fewer, as the embedding does in q2t; vectors, short convolutions and the routers of experts stay
    float32. `adapters`, low-rank ones with their scales, are added to the weights.
    """
    if format is not None and format not in FORMATS:
        raise ArgumentError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    started, checkpoint = time.perf_counter(), read(source, tokenizer, names)
    if progress:
        click.echo(checkpoint.described(), err=True)
    for path, scale in adapters:
        checkpoint = merged(checkpoint, Path(path), scale)
    recipe = format or ("q2t" if checkpoint.ternary else "keep" if checkpoint.quantized else "q4m")
    architecture = architectures.get(checkpoint.architecture)
    shapes, pairs = architecture.shapes(checkpoint.config), architecture.pairs(checkpoint.config)
    specs = {
        tensor: _spec(checkpoint, tensor, shape, pairs.get(tensor.split(".")[-1], 0), recipe)
        for tensor, shape in shapes.items()
    }
    report = Report(
        str(source), str(target), checkpoint.architecture, recipe, left_out=checkpoint.left_out, started=started
    )
    info = _model_info(checkpoint, recipe, name, license, origin)
    total, tables = sum(math.prod(shape) for shape in shapes.values()), _tables(checkpoint)
    with (
        report.written(),
        np.errstate(over="ignore", invalid="ignore"),  # account finds what overflowed
        Writer(target, info, checkpoint.tokenizer.json, specs, tables) as writer,
        click.progressbar(length=total, label=f"Converting {info.name}", file=sys.stderr, hidden=not progress) as bar,
    ):
        for tensor, spec in specs.items():
            row = report.row(spec.format)
            for values, stored, data in _pieces(checkpoint, tensor, spec):
                account(row, values, stored, data.nbytes, tensor)
                writer.write(tensor, data)
                bar.update(values.size)
    return report


def _spec(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], pair: int, recipe: str) -> TensorSpec:
    if len(shape) == 1 or name.rpartition(".")[2] in architectures.FLOAT32:
        return TensorSpec(shape, "f32")
    head = "output" if "output" in checkpoint.tensors else "embed"
    if recipe == "keep":
        recipe = max((part.type.keep for part in checkpoint.tensors[name]), key=lambda keep: quant.get(keep).TILE_BYTES)
    elif (recipe in ("q4", "q4m") and name == head) or (recipe == "q2t" and name in ("embed", "output")):
        recipe = "q8"
    return TensorSpec(shape, recipe, 0 if pair % quant.TILE_ROWS else pair)


def _model_info(
    checkpoint: Checkpoint, recipe: str, name: str | None, license: str | None, origin: str | None
) -> ModelInfo:
    said, tokenizer = checkpoint.metadata, checkpoint.tokenizer
    return ModelInfo(
        architecture=checkpoint.architecture,
        config=asdict(checkpoint.config),
        recipe=recipe,
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
        chat_template=checkpoint.chat_template,
        name=name or said.get("name") or Path(checkpoint.path).stem,
        license=license or said.get("license", "unknown"),
        origin=origin or said.get("source") or Path(checkpoint.path).name,
    )


def _tables(checkpoint: Checkpoint) -> bytes | None:
    try:
        return bpe.tables(checkpoint.tokenizer.json)
    except ValueError as error:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.path} cannot be read: {error}; expected a tokenizer.json of the tokenizers "
            "library: fetch it again"
        ) from error


def _pieces(checkpoint: Checkpoint, name: str, spec: TensorSpec) -> Iterator[tuple[F32, F32, Array]]:
    """A tensor some rows at a time: its values, the values as stored, what the file gets."""
    sources = checkpoint.tensors[name]
    turned = name.split(".")[-1].removesuffix("_bias") in checkpoint.interleaved
    head_dim = checkpoint.config.head_dim if turned else 0
    if len(spec.shape) == 1:
        values = np.concatenate([_values(source, source.read(0, 1))[0] for source in sources])
        values = values[row_order(len(values), 0, 1, head_dim)]
        yield values, values, pad_vector(values)
        return
    fmt, rows = quant.get(spec.format), sources[0].shape[0]
    step = _rows_at_once(spec, len(sources), head_dim)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        read = [_read(source, first, stop, spec.format) for source in sources]
        order = row_order(stop - first, spec.pair, len(sources), head_dim)
        values = np.concatenate([values for values, _ in read])[order]
        quantized = joined([quantized for _, quantized in read], order)
        yield values, fmt.dequantize(quantized), fmt.pack(quantized)


def _rows_at_once(spec: TensorSpec, n_sources: int, head_dim: int) -> int:
    """Rows of each source to convert together: whole tiles, heads and pairs, and no more than fits in CHUNK."""
    rows, cols = spec.shape
    if n_sources > 1 and not spec.pair:
        return rows // n_sources
    unit = math.lcm(quant.TILE_ROWS, head_dim or 1, 2 * spec.pair if n_sources == 1 and spec.pair else 1)
    return max(1, CHUNK // (cols * unit)) * unit


def _read(source: SourceTensor, first: int, stop: int, format: str) -> tuple[F32, quant.Quantized]:
    """Some rows of a source: their values, and what is nearest to them in a format."""
    raw = source.read(first, stop)
    values = _values(source, raw)
    kept = repack_rows(source.type, raw) if format == source.type.keep and not source.plus else None
    return values, kept or quant.get(format).quantize(values)


def _values(source: SourceTensor, raw: U8) -> F32:
    values: F32 = decode_rows(source.type, raw) + np.float32(source.plus)
    if not np.isfinite(values).all():
        raise CheckpointError(f"tensor {source.name!r} has weights that are not finite; the source is damaged")
    return values
