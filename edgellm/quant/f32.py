"""f32: float32 values, not quantized. A tile is [64 columns][16 rows]."""

from __future__ import annotations

import numpy as np

from edgellm.arrays import F32, U8
from edgellm.quant import TILE_COLS, TILE_ROWS, Quantized, by_matrix, by_tile

TILE_BYTES = TILE_ROWS * TILE_COLS * 4


def quantize(values: F32) -> Quantized:
    return Quantized(values.astype(np.float32))


def dequantize(quantized: Quantized) -> F32:
    return quantized.codes.astype(np.float32)


def pack(quantized: Quantized) -> U8:
    tiles = np.ascontiguousarray(by_tile(quantized.codes).transpose(0, 1, 3, 2))
    return tiles.view(np.uint8).reshape(*tiles.shape[:2], TILE_BYTES)


def unpack(tiles: U8, rows: int, cols: int) -> Quantized:
    values = np.ascontiguousarray(tiles).view(np.float32).reshape(*tiles.shape[:2], TILE_COLS, TILE_ROWS)
    return Quantized(by_matrix(values.transpose(0, 1, 3, 2), rows, cols))
