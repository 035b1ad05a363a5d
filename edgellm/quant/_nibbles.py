"""The 512 bytes of 4-bit codes that open a tile of q4 and q4m."""

from __future__ import annotations

import numpy as np

from edgellm.arrays import U8
from edgellm.quant import TILE_COLS, TILE_ROWS, by_matrix, by_tile

NIBBLE_BYTES = TILE_ROWS * TILE_COLS // 2


def pack_nibbles(codes: U8, zero: int) -> U8:
    """(rows, cols) codes 0..15 -> (row blocks, column tiles, 512), padded with the code `zero`.

    Byte [g][j][row][b] holds column g*32 + j*8 + b in its low half and the column 4 further in its high half.
    """
    tiles = by_tile(codes ^ zero) ^ zero
    grouped = tiles.reshape(*tiles.shape[:2], TILE_ROWS, 2, 4, 2, 4)  # row, g, j, half, b
    packed = grouped[..., 0, :] | grouped[..., 1, :] << 4
    return np.ascontiguousarray(packed.transpose(0, 1, 3, 4, 2, 5)).reshape(*tiles.shape[:2], NIBBLE_BYTES)


def unpack_nibbles(tiles: U8, rows: int, cols: int) -> U8:
    """The inverse of pack_nibbles."""
    blocks, columns = tiles.shape[:2]
    packed = tiles[..., :NIBBLE_BYTES].reshape(blocks, columns, 2, 4, TILE_ROWS, 4).transpose(0, 1, 4, 2, 3, 5)
    codes = np.stack([packed & 15, packed >> 4], axis=5)  # row, g, j, half, b
    return by_matrix(codes.reshape(blocks, columns, TILE_ROWS, TILE_COLS), rows, cols)
