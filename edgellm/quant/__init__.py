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


def get(name: str) -> Format:
    """The format module of that name; raises UnsupportedError with the known names."""
    if name not in names():
        raise UnsupportedError(f"unknown weight format {name!r}; known: {', '.join(names())}")
    return cast(Format, import_module(f"{__name__}.{name}"))


def tile_grid(rows: int, cols: int) -> tuple[int, int]:
    """Row blocks and column tiles that a matrix of that shape takes."""
    return -(-rows // TILE_ROWS), -(-cols // TILE_COLS)


def by_tile(codes: Array) -> Array:
    """(rows, cols) -> (row blocks, column tiles, 16, 64), padded with zeros."""
    rows, cols = codes.shape
    blocks, tiles = tile_grid(rows, cols)
    padded = np.zeros((blocks * TILE_ROWS, tiles * TILE_COLS), codes.dtype)
    padded[:rows, :cols] = codes
    return padded.reshape(blocks, TILE_ROWS, tiles, TILE_COLS).transpose(0, 2, 1, 3)


def by_matrix(tiles: Array, rows: int, cols: int) -> Array:
    """The inverse of by_tile: (row blocks, column tiles, r, c) -> (rows, cols), padding cut off."""
    blocks, columns, r, c = tiles.shape
    return tiles.transpose(0, 2, 1, 3).reshape(blocks * r, columns * c)[:rows, :cols]
