"""Weight formats: how the values of a matrix become bytes. One format a file, found by its name.

A matrix (rows = outputs, cols = inputs) is stored as tiles of 16 rows x 64 columns, row block after row block; see
docs/format.md. A format module has

    TILE_BYTES                 size of a tile, a multiple of 64
    quantize(values)           (rows, cols) float32 -> Quantized, the nearest values the format has
    dequantize(quantized)      -> (rows, cols) float32
    pack(quantized)            -> (row blocks, column tiles, TILE_BYTES) uint8, zero-padded
    unpack(tiles, rows, cols)  -> Quantized, the inverse

Any shape is allowed: the last row block and the last column tile are padded, and nothing outside sees it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, Protocol, cast

import numpy as np

from edgellm.arrays import F16, F32, U8, Array
from edgellm.errors import UnsupportedError

TILE_ROWS = 16
TILE_COLS = 64
GROUP = 32
"""Columns that share a scale (and a minimum) in the quantized formats."""


class Quantized(NamedTuple):
    """The values of a matrix in a format, before they are laid out in tiles."""

    codes: Array
    """(rows, cols): uint8 codes, or float16/float32 values in the formats that do not quantize."""
    scale: F16 | None = None
    """(rows, groups), groups = ceil(cols / 32)."""
    minimum: F16 | None = None
    """(rows, groups), in the formats that have one."""


class Format(Protocol):
    TILE_BYTES: int

    def quantize(self, values: F32) -> Quantized: ...
    def dequantize(self, quantized: Quantized) -> F32: ...
    def pack(self, quantized: Quantized) -> U8: ...
    def unpack(self, tiles: U8, rows: int, cols: int) -> Quantized: ...


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


@cache
def get(name: str) -> Format:
    """The format module of that name; raises UnsupportedError with the known names."""
    if not is_known(name):
        raise UnsupportedError(f"unknown weight format {name!r}; known: {', '.join(names())}")
    return cast(Format, import_module(f"{__name__}.{name}"))


def is_known(name: str) -> bool:
    return name in _known()


@cache
def _known() -> tuple[str, ...]:
    return tuple(names())


def tile_grid(rows: int, cols: int) -> tuple[int, int]:
    """Row blocks and column tiles that a matrix of that shape takes."""
    return -(-rows // TILE_ROWS), -(-cols // TILE_COLS)


def paired(rows: int, half: int) -> Array:
    """The order in which a paired matrix stores its rows: of every 2 * half rows, blocks of 16 of the first half
    and of the second take turns. So the two rows that RoPE turns together, or that a GLU multiplies, are near."""
    order: Array = np.arange(rows).reshape(-1, 2, half // TILE_ROWS, TILE_ROWS).swapaxes(1, 2).reshape(-1)
    return order


def by_tile(codes: Array) -> Array:
    """(rows, cols) -> (row blocks, column tiles, 16, 64), padded with zeros."""
    rows, cols = codes.shape
    blocks, tiles = tile_grid(rows, cols)
    padded = np.zeros((blocks * TILE_ROWS, tiles * TILE_COLS), codes.dtype)
    padded[:rows, :cols] = codes
    tiled: Array = padded.reshape(blocks, TILE_ROWS, tiles, TILE_COLS).transpose(0, 2, 1, 3)
    return tiled


def by_matrix(tiles: Array, rows: int, cols: int) -> Array:
    """The inverse of by_tile: (row blocks, column tiles, r, c) -> (rows, cols), padding cut off."""
    blocks, columns, r, c = tiles.shape
    padded: Array = tiles.transpose(0, 2, 1, 3).reshape(blocks * r, columns * c)
    return padded[:rows, :cols]


def by_group(values: F32) -> F32:
    """(rows, cols) -> (rows, groups, 32); a short last group repeats its last value, so its range is its own."""
    rows, cols = values.shape
    return np.pad(values, ((0, 0), (0, -cols % GROUP)), mode="edge").reshape(rows, -1, GROUP)


def per_column(per_group: Array, cols: int) -> F32:
    """(rows, groups) -> (rows, cols) float32: each group's number for each of its columns."""
    return np.repeat(per_group.astype(np.float32), GROUP, axis=1)[:, :cols]


def to_f16(values: Array) -> F16:
    """Round to float16; what it cannot hold becomes infinite, which the caller's error measure shows."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def divide(values: F32, scale: Array) -> F32:
    """values / scale, 0 where the scale is 0."""
    divisor = scale.astype(np.float32)
    return np.divide(values, divisor, out=np.zeros_like(values), where=divisor != 0)


def pack_line(per_group: F16, tiles: int) -> U8:
    """(rows, groups) float16 -> (row blocks, column tiles, 64): a tile's cache line of [group][row], zero-padded."""
    rows, groups = per_group.shape
    padded = np.zeros((-(-rows // TILE_ROWS) * TILE_ROWS, tiles * 2), np.float16)
    padded[:rows, :groups] = per_group
    line = padded.reshape(-1, TILE_ROWS, tiles, 2).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(line).view(np.uint8).reshape(-1, tiles, 64)


def unpack_line(line: U8, rows: int, cols: int) -> F16:
    """The inverse of pack_line: (row blocks, column tiles, 64) -> (rows, groups) float16."""
    blocks, tiles, _ = line.shape
    per_tile = np.ascontiguousarray(line).view(np.float16).reshape(blocks, tiles, 2, TILE_ROWS)
    padded: F16 = per_tile.transpose(0, 3, 1, 2).reshape(blocks * TILE_ROWS, tiles * 2)
    return padded[:rows, : -(-cols // GROUP)]
