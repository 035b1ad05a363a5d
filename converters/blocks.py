"""How checkpoints store values: blocks of bytes that decode to float32. Knows no file.

A row of a matrix is a whole number of blocks, one after another. Block layouts are those of ggml; a plain number
type is a block of one value. `keep` is the weight format of edgellm.quant that holds the values best, and `repack`,
where there is one, gives the codes of that format without a detour over floats. `encode` is the inverse of `repack`,
where every value of the format has a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgellm.arrays import F16, F32, U8, Array
from edgellm.errors import UnsupportedError
from edgellm.quant import GROUP, Quantized, q2t


@dataclass(frozen=True)
class BlockType:
    name: str
    block_size: int
    block_bytes: int
    keep: str
    """A name of edgellm.quant."""
    decode: Callable[[U8], F32]
    """(blocks, block_bytes) -> (blocks, block_size)."""
    repack: Callable[[U8], Quantized] | None = None
    """(blocks, block_bytes) -> codes (blocks, block_size), scale and minimum (blocks, block_size / 32)."""
    encode: Callable[[Quantized], U8] | None = None
    """The inverse of repack."""


def type_of(format: str, cols: int) -> BlockType:
    """The type that holds every value of a format exactly, in rows of `cols`: that of the format, or else F32."""
    kept = (type for type in TYPES.values() if type.keep == format and type.encode and cols % type.block_size == 0)
    return next(kept, TYPES["F32"])


def encode_rows(block_type: BlockType, quantized: Quantized) -> U8:
    """Values of the format `keep`, (rows, cols), as the type stores them: -> (rows, row bytes) uint8."""
    assert block_type.encode is not None
    rows = len(quantized.codes)
    sizes = block_type.block_size, block_type.block_size // GROUP, block_type.block_size // GROUP
    by_block = (
        None if array is None else array.reshape(-1, size) for array, size in zip(quantized, sizes, strict=True)
    )
    return block_type.encode(Quantized(*by_block)).reshape(rows, -1)  # type: ignore[arg-type]


def row_bytes(block_type: BlockType, cols: int) -> int:
    """Bytes of a row of `cols` values."""
    assert cols % block_type.block_size == 0
    return cols // block_type.block_size * block_type.block_bytes


def decode_rows(block_type: BlockType, raw: U8) -> F32:
    """(rows, row bytes) uint8 -> (rows, cols). Values that overflow or are not numbers come out as inf or nan."""
    with np.errstate(all="ignore"):
        return block_type.decode(_blocks(block_type, raw)).reshape(len(raw), -1)


def repack_rows(block_type: BlockType, raw: U8) -> Quantized | None:
    """(rows, row bytes) uint8 -> the same values in the format `keep`; None where that needs rounding to a new grid."""
    if block_type.repack is None:
        return None
    with np.errstate(all="ignore"):
        codes, scale, minimum = block_type.repack(_blocks(block_type, raw))
    rows = len(raw)
    return Quantized(
        codes.reshape(rows, -1),
        None if scale is None else scale.reshape(rows, -1),
        None if minimum is None else minimum.reshape(rows, -1),
    )


def _blocks(block_type: BlockType, raw: U8) -> U8:
    return np.ascontiguousarray(raw).reshape(-1, block_type.block_bytes)


# Plain numbers.


def _f32(blocks: U8) -> F32:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16_codes(blocks: U8) -> F16:
    return blocks.view("<f2").astype(np.float16, copy=False)


def _f16(blocks: U8) -> F32:
    return _f16_codes(blocks).astype(np.float32)


def _numbers(dtype: str) -> Callable[[Quantized], U8]:
    def encode(quantized: Quantized) -> U8:
        return np.ascontiguousarray(quantized.codes, dtype).view(np.uint8)

    return encode


def _bf16(blocks: U8) -> F32:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


# Blocks of 32: a scale, perhaps a minimum, and codes.


def _half(blocks: U8, at: int) -> F16:
    """The float16 at that byte of each block: (blocks, 1)."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float16, copy=False)


def _single(blocks: U8, at: int) -> F32:
    return _half(blocks, at).astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """(..., n) -> (..., 2n): all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _five_bits(blocks: U8, at: int) -> Array:
    """Four bytes with the fifth bits, then 16 with the nibbles: (blocks, 32)."""
    fifth = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return _nibbles(blocks[:, at + 4 :]) | fifth << 4


def _signed(codes: Array, zero: int) -> F32:
    values: F32 = codes.astype(np.float32) - np.float32(zero)
    return values


def _q4_0(blocks: U8) -> F32:
    return _single(blocks, 0) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks: U8) -> F32:
    return _single(blocks, 0) * _nibbles(blocks[:, 4:]) + _single(blocks, 2)


def _q5_0(blocks: U8) -> F32:
    return _single(blocks, 0) * _signed(_five_bits(blocks, 2), 16)


def _q5_1(blocks: U8) -> F32:
    return _single(blocks, 0) * _five_bits(blocks, 4) + _single(blocks, 2)


def _q8_0(blocks: U8) -> F32:
    return _single(blocks, 0) * blocks[:, 2:].view(np.int8)


def _halves(*numbers: F16 | None) -> Iterator[U8]:
    """The bytes of one float16 a block each."""
    for number in numbers:
        assert number is not None
        yield np.ascontiguousarray(number, "<f2").view(np.uint8)


def _packed(codes: U8) -> U8:
    """The inverse of _nibbles."""
    low, high = np.split(codes, 2, axis=-1)
    return (low | high << 4).astype(np.uint8, copy=False)


def _q4_0_codes(blocks: U8) -> Quantized:
    return Quantized(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1_codes(blocks: U8) -> Quantized:
    return Quantized(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q4_0_blocks(quantized: Quantized) -> U8:
    return np.concatenate([*_halves(quantized.scale), _packed(quantized.codes)], axis=1)


def _q4_1_blocks(quantized: Quantized) -> U8:
    return np.concatenate([*_halves(quantized.scale, quantized.minimum), _packed(quantized.codes)], axis=1)


def _q5_0_codes(blocks: U8) -> Quantized:
    return Quantized(_five_bits(blocks, 2) + np.uint8(128 - 16), _half(blocks, 0))


def _q8_0_codes(blocks: U8) -> Quantized:
    # Flipping the sign bit of a two's complement byte adds 128.
    return Quantized(blocks[:, 2:] ^ 128, _half(blocks, 0))


def _q8_0_blocks(quantized: Quantized) -> U8:
    return np.concatenate([*_halves(quantized.scale), quantized.codes ^ 128], axis=1)


# Blocks of 256: scales of 16 or 32 values are themselves small integers, under one or two scales of the whole block.


_SHIFTS = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)


def _two_bits(packed: U8) -> Array:
    """64 bytes -> (blocks, 2, 4, 32): each half holds its four runs of 32 codes side by side in its bytes' bits."""
    return packed.reshape(-1, 2, 1, 32) >> _SHIFTS & 3


def _k_nibbles(packed: U8) -> U8:
    """128 bytes -> (blocks, 8, 32): each 32 bytes hold a group in their low halves and the next in their high."""
    return _nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _k_scales(blocks: U8) -> tuple[F32, F32]:
    """Scale and offset of the 8 groups of Q4_K and Q5_K: (blocks, 8, 1) each.

    Twelve bytes from the fourth on hold 8 + 8 integers of six bits: the first 4 + 4 in the low six bits of
    the first eight bytes, the last in the nibbles of the last four and the two bits left above the others.
    """
    first, second, last = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    minimum = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return (_single(blocks, 0) * scale)[..., None], (_single(blocks, 2) * minimum)[..., None]


def _q4_k(blocks: U8) -> F32:
    scale, minimum = _k_scales(blocks)
    return scale * _k_nibbles(blocks[:, 16:]) - minimum


def _q4_k_codes(blocks: U8) -> Quantized:
    scale, minimum = _k_scales(blocks)
    return Quantized(_k_nibbles(blocks[:, 16:]), scale.astype(np.float16), (-minimum).astype(np.float16))


def _q5_k(blocks: U8) -> F32:
    scale, minimum = _k_scales(blocks)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(8, 1) & 1
    return scale * (_k_nibbles(blocks[:, 48:]) | fifth << 4) - minimum


def _q6_k(blocks: U8) -> F32:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 16, 16)
    high = _two_bits(blocks[:, 128:192]).reshape(-1, 16, 16)
    scale = _single(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return scale[..., None] * _signed(low | high << 4, 32)


def _q2_k(blocks: U8) -> F32:
    scale = _single(blocks, 80) * (blocks[:, :16] & 15)
    minimum = _single(blocks, 82) * (blocks[:, :16] >> 4)
    return scale[..., None] * _two_bits(blocks[:, 16:80]).reshape(-1, 16, 16) - minimum[..., None]


def _q3_k(blocks: U8) -> F32:
    third = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(8, 1) & 1).reshape(-1, 16, 16)
    high = blocks[:, None, 104:108] >> _SHIFTS & 3
    scale = _single(blocks, 108) * _signed(_nibbles(blocks[:, 96:104]) | high.reshape(-1, 16) << 4, 32)
    codes = _two_bits(blocks[:, 32:96]).reshape(-1, 16, 16) | third << 2
    return scale[..., None] * _signed(codes, 4)


# Blocks of 256 with one scale, of the values -1, 0 and 1 times it.


def _ternary(scale: F16, codes: Array) -> Quantized:
    return Quantized(codes.reshape(-1, 256), np.repeat(scale, 8, axis=1))


def _tq1_0_codes(blocks: U8) -> Quantized:
    """Five digits to the base of 3 in a byte, which is the fraction that they are of 1: times 3 gives the next one."""
    runs = [_digits(blocks[:, :32], 5), _digits(blocks[:, 32:48], 5), _digits(blocks[:, 48:52], 4)]
    return _ternary(_half(blocks, 52), np.concatenate(runs, axis=1))


def _digits(packed: U8, count: int) -> Array:
    """(blocks, n) -> (blocks, count * n): the first digit of each byte, then the second of each..."""
    powers = (3 ** np.arange(count)).astype(np.uint8).reshape(-1, 1)
    fractions = packed[:, None] * powers
    return (fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


def _tq2_0_codes(blocks: U8) -> Quantized:
    return _ternary(_half(blocks, 64), _two_bits(blocks[:, :64]))


def _tq2_0_blocks(quantized: Quantized) -> U8:
    """Raises UnsupportedError unless each block has one scale."""
    assert quantized.scale is not None
    if (quantized.scale != quantized.scale[:, :1]).any():
        raise UnsupportedError(
            "a ternary matrix has scales of 32 weights each, which TQ2_0 has of 256; convert the model with "
            "--format q8 and export that"
        )
    runs = quantized.codes.reshape(-1, 2, 4, 32) << _SHIFTS
    packed = np.bitwise_or.reduce(runs, axis=2).reshape(-1, 64)
    return np.concatenate([packed, *_halves(quantized.scale[:, :1])], axis=1)


TYPES = {
    block_type.name: block_type
    for block_type in (
        BlockType("F32", 1, 4, "f32", _f32, lambda blocks: Quantized(_f32(blocks)), _numbers("<f4")),
        BlockType("F16", 1, 2, "f16", _f16, lambda blocks: Quantized(_f16_codes(blocks)), _numbers("<f2")),
        BlockType("BF16", 1, 2, "f32", _bf16),
        BlockType("Q4_0", 32, 18, "q4", _q4_0, _q4_0_codes, _q4_0_blocks),
        BlockType("Q4_1", 32, 20, "q4m", _q4_1, _q4_1_codes, _q4_1_blocks),
        BlockType("Q5_0", 32, 22, "q8", _q5_0, _q5_0_codes),
        BlockType("Q5_1", 32, 24, "q8", _q5_1),
        BlockType("Q8_0", 32, 34, "q8", _q8_0, _q8_0_codes, _q8_0_blocks),
        BlockType("Q2_K", 256, 84, "q4m", _q2_k),
        BlockType("Q3_K", 256, 110, "q4m", _q3_k),
        BlockType("Q4_K", 256, 144, "q4m", _q4_k, _q4_k_codes),
        BlockType("Q5_K", 256, 176, "q8", _q5_k),
        BlockType("Q6_K", 256, 210, "q8", _q6_k),
        BlockType("TQ1_0", 256, 54, "q2t", lambda blocks: q2t.dequantize(_tq1_0_codes(blocks)), _tq1_0_codes),
        BlockType(
            "TQ2_0", 256, 66, "q2t", lambda blocks: q2t.dequantize(_tq2_0_codes(blocks)), _tq2_0_codes, _tq2_0_blocks
        ),
    )
}

BYTE = BlockType("U8", 1, 1, "f32", lambda blocks: blocks.astype(np.float32))
"""Bytes of which a reader knows what they mean; no type of ggml."""
