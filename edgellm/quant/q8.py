"""q8: 8-bit symmetric, 8.5 bits a weight; value = (code - 128) * scale, a float16 scale for 32 columns."""

from __future__ import annotations

import numpy as np

from edgellm.arrays import F32, U8
from edgellm.quant import (
    TILE_COLS,
    TILE_ROWS,
    Quantized,
    by_group,
    by_matrix,
    by_tile,
    divide,
    pack_line,
    per_column,
    to_f16,
    unpack_line,
)

TILE_BYTES = 1024 + 64
ZERO = 128


def quantize(values: F32) -> Quantized:
    groups = by_group(values)
    scale = to_f16(np.abs(groups).max(2) / 127)
    codes = np.clip(np.rint(divide(groups, scale[..., None])), -127, 127) + ZERO
    return Quantized(codes.astype(np.uint8).reshape(len(values), -1)[:, : values.shape[1]], scale)


def dequantize(quantized: Quantized) -> F32:
    assert quantized.scale is not None
    centred = quantized.codes.astype(np.float32) - ZERO
    return centred * per_column(quantized.scale, centred.shape[1])


def pack(quantized: Quantized) -> U8:
    """Bytes of a tile: [column / 4][row][column % 4] codes, then [group][row] scales."""
    assert quantized.scale is not None
    codes = by_tile(quantized.codes ^ ZERO)  # so that padding is the value 0 too
    blocks, tiles = codes.shape[:2]
    codes = codes.reshape(blocks, tiles, TILE_ROWS, TILE_COLS // 4, 4).swapaxes(2, 3) ^ ZERO
    return np.concatenate([codes.reshape(blocks, tiles, 1024), pack_line(quantized.scale, tiles)], axis=2)


def unpack(tiles: U8, rows: int, cols: int) -> Quantized:
    blocks, columns = tiles.shape[:2]
    codes = tiles[..., :1024].reshape(blocks, columns, TILE_COLS // 4, TILE_ROWS, 4).swapaxes(2, 3)
    codes = codes.reshape(blocks, columns, TILE_ROWS, TILE_COLS)
    return Quantized(by_matrix(codes, rows, cols), unpack_line(tiles[..., 1024:], rows, cols))
