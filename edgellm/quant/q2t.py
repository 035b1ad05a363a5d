"""q2t: ternary, 2.5 bits a weight; value = (code - 1) * scale, a float16 scale for 32 columns.

Of BitNet b1.58 (arXiv:2402.17764), whose matrices hold -s, 0 and s alone: those it keeps exactly, if s is a float16.
"""

from __future__ import annotations

import numpy as np

from edgellm.arrays import F16, F32, U8
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

CODE_BYTES = TILE_ROWS * TILE_COLS // 4
TILE_BYTES = CODE_BYTES + 64
ZERO = 1


def quantize(values: F32) -> Quantized:
    groups = by_group(values)
    scale = _scale(groups)
    codes = np.clip(np.rint(divide(groups, scale[..., None])), -1, 1) + ZERO
    return Quantized(codes.astype(np.uint8).reshape(len(values), -1)[:, : values.shape[1]], scale)


def _scale(groups: F32) -> F16:
    """The scale with the least squared error of each group: the mean of its n largest magnitudes, for the best n, since
    n values at their mean m instead of 0 take n * m^2 off the error."""
    total = np.sort(np.abs(groups), axis=2)[..., ::-1].cumsum(axis=2)
    count = np.arange(1, groups.shape[2] + 1, dtype=np.float32)
    best = (np.square(total) / count).argmax(axis=2)[..., None]
    return to_f16(np.take_along_axis(total / count, best, axis=2)[..., 0])


def dequantize(quantized: Quantized) -> F32:
    assert quantized.scale is not None
    centred = quantized.codes.astype(np.float32) - ZERO
    return centred * per_column(quantized.scale, centred.shape[1])


def pack(quantized: Quantized) -> U8:
    """Bytes of a tile: [column / 16][row][column % 4] with four codes a byte, then [group][row] scales."""
    assert quantized.scale is not None
    codes = by_tile(quantized.codes ^ ZERO) ^ ZERO  # so that padding is the value 0 too
    blocks, tiles = codes.shape[:2]
    runs = codes.reshape(blocks, tiles, TILE_ROWS, TILE_COLS // 16, 4, 4)  # row, run of 16 columns, four of it, column
    packed = np.bitwise_or.reduce(runs << _SHIFTS, axis=4).swapaxes(2, 3)
    return np.concatenate([packed.reshape(blocks, tiles, CODE_BYTES), pack_line(quantized.scale, tiles)], axis=2)


def unpack(tiles: U8, rows: int, cols: int) -> Quantized:
    blocks, columns = tiles.shape[:2]
    packed = tiles[..., :CODE_BYTES].reshape(blocks, columns, TILE_COLS // 16, TILE_ROWS, 1, 4).swapaxes(2, 3)
    codes = (packed >> _SHIFTS & 3).reshape(blocks, columns, TILE_ROWS, TILE_COLS)
    return Quantized(by_matrix(codes, rows, cols), unpack_line(tiles[..., CODE_BYTES:], rows, cols))


_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]
