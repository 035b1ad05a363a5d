"""Which tensors of a checkpoint, or which rows of them, are ours: what the tables of an architecture say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.architectures import Architecture, Stored
from edgellm.arrays import U8, Array
from edgellm.config import template
from edgellm.errors import CheckpointError, UnsupportedError

from .checkpoint import SourceTensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a checkpoint has a tensor of ours: rows of one of its tensors."""

    tensor: str
    shape: Shape
    """Of the checkpoint's tensor."""
    rows: Array | None
    """None for all, in their order."""
    stored: Stored

    def view(self, whole: SourceTensor) -> SourceTensor:
        """The rows as a tensor of their own; raises UnsupportedError if blocks of values would have to be cut."""
        whole = replace(whole, plus=self.stored.plus)
        if self.rows is None:
            return whole
        if len(self.shape) > 1 and not self.stored.transposed:
            return replace(whole, shape=(len(self.rows), whole.shape[-1]), read=_rows(whole, self.rows))
        if whole.type.block_size > 1:
            raise UnsupportedError(
                f"tensor {whole.name!r} is stored as {whole.type.name}, but has to be taken apart value by value; "
                "choose a file that has it in F32, F16 or BF16"
            )
        if self.stored.transposed:
            return replace(whole, shape=(len(self.rows), whole.shape[0]), read=_columns(whole, self.rows))
        return replace(whole, shape=self.rows.shape, read=_elements(whole, self.rows))


def _rows(whole: SourceTensor, rows: Array) -> Callable[[int, int], U8]:
    def read(first: int, stop: int) -> U8:
        chosen = rows[first:stop]
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        return np.concatenate([whole.read(int(run[0]), int(run[-1]) + 1) for run in runs])

    return read


def _columns(whole: SourceTensor, columns: Array) -> Callable[[int, int], U8]:
    def read(first: int, stop: int) -> U8:
        values = whole.read(0, whole.shape[0]).reshape(*whole.shape, -1)[:, columns[first:stop]]
        return np.ascontiguousarray(values.swapaxes(0, 1)).reshape(stop - first, -1)

    return read


def _elements(whole: SourceTensor, elements: Array) -> Callable[[int, int], U8]:
    return lambda first, stop: whole.read(first, stop).reshape(*whole.shape, -1)[elements].reshape(1, -1)


def places(architecture: Architecture, config: Any, names: Mapping[str, str | Stored]) -> dict[str, Place]:
    """Each tensor that `parts` tells of, in a checkpoint whose table is `names`."""
    shapes = {part: shape for made_of in parts(architecture, config).values() for part, shape in made_of.items()}
    return {part: _place(part, shapes, names, config) for part in shapes}


def _place(part: str, shapes: Mapping[str, Shape], names: Mapping[str, str | Stored], config: Any) -> Place:
    (key, numbers), shape = template(part), shapes[part]
    entry = names[key]
    stored = Stored(entry) if isinstance(entry, str) else entry
    together = [other.format(*numbers) for other in stored.of or (key,)]
    sizes, nth, rows = [shapes[other][0] for other in together], together.index(part), np.arange(shape[0])
    if stored.by_head:
        head, row = np.divmod(rows, config.head_dim)
        rows = (head * len(together) + nth) * config.head_dim + row
    else:
        rows = sum(sizes[:nth]) + rows
    whole: Shape = (sum(sizes), *shape[1:])
    if stored.name.count("{}") < len(numbers):
        rows, whole = numbers[-1] * sum(sizes) + rows, (config.n_experts, *whole)
    elif stored.transposed:
        whole = whole[::-1]
    plain = whole == shape and not stored.transposed
    return Place(stored.name.format(*numbers), whole, None if plain else rows, stored)


def parts(architecture: Architecture, config: Any) -> dict[str, dict[str, Shape]]:
    """Our tensor -> the tensors of the architecture's tables that it is made of, with the shape of each."""
    result: dict[str, dict[str, Shape]] = {}
    for name, shape in architecture.shapes(config).items():
        key, numbers = template(name)
        made_of = architecture.STACKED.get(key, (key,))
        result[name] = {part.format(*numbers): (shape[0] // len(made_of), *shape[1:]) for part in made_of}
    return result


def stack(
    architecture: Architecture, config: Any, found: Mapping[str, SourceTensor]
) -> dict[str, tuple[SourceTensor, ...]]:
    """Checkpoint.tensors, from tensors by the names of the architecture's tables."""
    return {name: tuple(found[part] for part in made_of) for name, made_of in parts(architecture, config).items()}


def match_tensors(
    path: Path,
    architecture: Architecture,
    config: Any,
    names: Mapping[str, str | Stored],
    found: Mapping[str, SourceTensor],
) -> dict[str, tuple[SourceTensor, ...]]:
    """The model's tensors under our names; `names` is the architecture's table for this kind of checkpoint.

    Raises one CheckpointError that names every tensor that is missing, not of the model, or of another shape.
    """
    found = {name: _flat(tensor) for name, tensor in found.items()}
    # Before anything is made for each layer: the number comes from the file.
    if config.n_layers > len(found):
        raise CheckpointError(
            f"{path} says that it has {config.n_layers} layers, but holds {len(found)} tensors; "
            "expected several for each layer: is a part of it missing?"
        )
    where = places(architecture, config, names)
    expected = {place.tensor: place.shape for place in where.values()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not a tensor of this architecture" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {found[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise CheckpointError(f"{path} does not hold the tensors that its config asks for: {'; '.join(problems)}")
    return stack(architecture, config, {part: place.view(found[place.tensor]) for part, place in where.items()})


def _flat(tensor: SourceTensor) -> SourceTensor:
    """A convolution by channel has kernels of (channels, 1, size), which is a matrix."""
    if len(tensor.shape) == 3 and tensor.shape[1] == 1:
        return replace(tensor, shape=(tensor.shape[0], tensor.shape[2]))
    return tensor
