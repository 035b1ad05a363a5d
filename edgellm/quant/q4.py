"""q4: 4-bit symmetric, 4.5 bits a weight; value = (code - 8) * scale, a float16 scale for 32 columns."""

from __future__ import annotations

import numpy as np

from edgellm.arrays import F16, F32, U8, Array
from edgellm.quant import Quantized, by_group, divide, pack_line, per_column, to_f16, unpack_line
from edgellm.quant._nibbles import NIBBLE_BYTES, pack_nibbles, unpack_nibbles

TILE_BYTES = NIBBLE_BYTES + 64
ZERO = 8


def quantize(values: F32) -> Quantized:
    """Try scales around the one that just holds the largest value; keep each group's best in squared error."""
    groups = by_group(values)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(2, keepdims=True), axis=2)[..., 0]
    best_codes, best_scale, best_error = _round(groups, to_f16(extreme / -8))
    for divisor in (-8.5, -7.5, -7.0, 7.0):
        codes, _, _ = _round(groups, to_f16(extreme / divisor))
        codes, scale, error = _round(groups, to_f16(_fit(groups, codes)))
        better = error < best_error
        best_codes[better], best_scale[better], best_error[better] = codes[better], scale[better], error[better]
    unsigned = (best_codes + ZERO).astype(np.uint8).reshape(len(values), -1)
    return Quantized(unsigned[:, : values.shape[1]], best_scale)


def _round(groups: F32, scale: F16) -> tuple[F32, F16, F32]:
    """The nearest codes -8..7 for a scale, with it and the squared error of each group."""
    codes = np.clip(np.rint(divide(groups, scale[..., None])), -8, 7)
    error = np.square(codes * scale[..., None].astype(np.float32) - groups).sum(2)
    return codes, scale, error


def _fit(groups: F32, codes: F32) -> Array:
    """The scale with the least squared error for given codes."""
    return divide((groups * codes).sum(2), np.square(codes).sum(2))


def dequantize(quantized: Quantized) -> F32:
    assert quantized.scale is not None
    centred = quantized.codes.astype(np.float32) - ZERO
    return centred * per_column(quantized.scale, centred.shape[1])


def pack(quantized: Quantized) -> U8:
    """Bytes of a tile: the codes' nibbles, then [group][row] scales."""
    assert quantized.scale is not None
    nibbles = pack_nibbles(quantized.codes, ZERO)
    return np.concatenate([nibbles, pack_line(quantized.scale, nibbles.shape[1])], axis=2)


def unpack(tiles: U8, rows: int, cols: int) -> Quantized:
    return Quantized(unpack_nibbles(tiles, rows, cols), unpack_line(tiles[..., NIBBLE_BYTES:], rows, cols))
