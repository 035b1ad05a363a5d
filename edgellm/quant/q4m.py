"""q4m: 4-bit with a minimum, 5 bits a weight; value = code * scale + minimum, both float16, for 32 columns."""

from __future__ import annotations

import numpy as np

from edgellm.arrays import F16, F32, U8, Array
from edgellm.quant import Quantized, by_group, divide, pack_line, per_column, to_f16, unpack_line
from edgellm.quant._nibbles import NIBBLE_BYTES, pack_nibbles, unpack_nibbles

TILE_BYTES = NIBBLE_BYTES + 64 + 64


def quantize(values: F32) -> Quantized:
    """Start from ranges that hold all or most of a group, refit by least squares, keep each group's best."""
    groups = by_group(values)
    low, high = groups.min(2), groups.max(2)
    best = _round(groups, to_f16((high - low) / 15), to_f16(low))
    for cut in (0.0, 0.04, 0.08):
        margin = cut * (high - low)
        tried = _round(groups, to_f16((high - low - 2 * margin) / 15), to_f16(low + margin))
        for _ in range(2):
            tried = _round(groups, *_fit(groups, tried[0]))
            better = tried[3] < best[3]
            for i in range(len(best)):
                best[i][better] = tried[i][better]
    codes, scale, minimum, _ = best
    return Quantized(codes.astype(np.uint8).reshape(len(values), -1)[:, : values.shape[1]], scale, minimum)


def _round(groups: F32, scale: F16, minimum: F16) -> tuple[F32, F16, F16, F32]:
    """The nearest codes 0..15 for a scale and minimum, with both and the squared error of each group."""
    offset = minimum[..., None].astype(np.float32)
    codes = np.clip(np.rint(divide(groups - offset, scale[..., None])), 0, 15)
    error = np.square(codes * scale[..., None].astype(np.float32) + offset - groups).sum(2)
    return codes, scale, minimum, error


def _fit(groups: F32, codes: F32) -> tuple[F16, F16]:
    """The line through (code, value) with the least squared error."""
    mean_code, mean = codes.mean(2), groups.mean(2)
    deviation: Array = codes - mean_code[..., None]
    scale = divide((deviation * groups).sum(2), np.square(deviation).sum(2))
    return to_f16(scale), to_f16(mean - scale * mean_code)


def dequantize(quantized: Quantized) -> F32:
    assert quantized.scale is not None
    assert quantized.minimum is not None
    cols = quantized.codes.shape[1]
    return quantized.codes * per_column(quantized.scale, cols) + per_column(quantized.minimum, cols)


def pack(quantized: Quantized) -> U8:
    """Bytes of a tile: the codes' nibbles, [group][row] scales, [group][row] minima."""
    assert quantized.scale is not None
    assert quantized.minimum is not None
    nibbles = pack_nibbles(quantized.codes, 0)
    lines = [pack_line(line, nibbles.shape[1]) for line in (quantized.scale, quantized.minimum)]
    return np.concatenate([nibbles, *lines], axis=2)


def unpack(tiles: U8, rows: int, cols: int) -> Quantized:
    scale, minimum = (unpack_line(tiles[..., at : at + 64], rows, cols) for at in (NIBBLE_BYTES, NIBBLE_BYTES + 64))
    return Quantized(unpack_nibbles(tiles, rows, cols), scale, minimum)
