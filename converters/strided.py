"""Tensors as NumPy and PyTorch lay them out: from an offset on, with a stride in each dimension."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.arrays import U8
from edgellm.errors import UnsupportedError

from .blocks import BlockType
from .checkpoint import SourceTensor

Read = Callable[[int, int], U8]
"""read(begin, count) -> (count,) uint8."""


def strided(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], type: BlockType, read: Read, begin: int
) -> SourceTensor:
    """A tensor whose first value is at byte `begin` of what `read` reads. `strides` are in values, and lead to no byte
    that is not there.

    Raises UnsupportedError unless all values, those of a row or those of a column follow one another.
    """
    item = type.block_bytes
    if _is_contiguous(shape, strides):
        rows = _rows(read, begin, item * (shape[-1] if shape else 1))
    elif len(shape) == 2 and strides[1] == 1:
        rows = _rows_apart(read, begin, item * shape[1], item * strides[0])
    elif len(shape) == 2 and strides[0] == 1:
        rows = _columns(read, begin, shape[1], item, item * strides[1])
    else:
        raise UnsupportedError(
            f"tensor {name!r} of shape {shape} has its values {strides} apart; this version reads matrices by rows or "
            "by columns, and others in their order: save it contiguous"
        )
    return SourceTensor(name, shape, type, rows)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _rows(read: Read, begin: int, row_bytes: int) -> Read:
    def rows(first: int, stop: int) -> U8:
        return read(begin + first * row_bytes, (stop - first) * row_bytes).reshape(stop - first, row_bytes)

    return rows


def _rows_apart(read: Read, begin: int, row_bytes: int, step: int) -> Read:
    return lambda first, stop: np.stack([read(begin + row * step, row_bytes) for row in range(first, stop)])


def _columns(read: Read, begin: int, cols: int, item: int, step: int) -> Read:
    def rows(first: int, stop: int) -> U8:
        columns = np.stack([read(begin + first * item + col * step, (stop - first) * item) for col in range(cols)])
        values: U8 = columns.reshape(cols, stop - first, item).swapaxes(0, 1)
        return values.reshape(stop - first, cols * item)

    return rows
