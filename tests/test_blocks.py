import gguf
import numpy as np
import pytest

from edgellm import quant
from edgellm.converters.blocks import TYPES, decode_rows, repack_rows, row_bytes

ONE, HALF = np.float16(1).tobytes(), np.float16(0.5).tobytes()
RAMP = bytes(i | (15 - i) << 4 for i in range(16))  # codes 0 ... 15, then 15 ... 0
UP_DOWN = [*range(16), *range(15, -1, -1)]

BY_HAND = {
    "F32": (np.float32([1.5, -2]).tobytes(), [1.5, -2]),
    "F16": (np.float16([1.5, -2]).tobytes(), [1.5, -2]),
    "BF16": (bytes([0xC0, 0x3F, 0x00, 0xC0]), [1.5, -2]),
    "Q4_0": (HALF + RAMP, [0.5 * (code - 8) for code in UP_DOWN]),
    "Q4_1": (HALF + ONE + RAMP, [0.5 * code + 1 for code in UP_DOWN]),
    "Q5_0": (HALF + bytes([1, 0, 0, 128]) + RAMP, [0.5 * (code - 16) for code in [16, *UP_DOWN[1:31], 16]]),
    "Q5_1": (HALF + ONE + bytes([1, 0, 0, 128]) + RAMP, [0.5 * code + 1 for code in [16, *UP_DOWN[1:31], 16]]),
    "Q8_0": (HALF + bytes([128, 255, 127, *range(29)]), [0.5 * code for code in [-128, -1, 127, *range(29)]]),
    # 2, 0, 1, 1, 0 to the base of 3 is 174 of 243, or 184 of 256.
    "TQ1_0": (
        bytes([184] * 52) + HALF,
        [
            *np.repeat([0.5, -0.5, 0, 0, -0.5], 32),
            *np.repeat([0.5, -0.5, 0, 0, -0.5], 16),
            *np.repeat([0.5, -0.5, 0, 0], 4),
        ],
    ),
    "TQ2_0": (bytes([0b10000110] * 64) + HALF, [*np.repeat([0.5, 0, -0.5, 0.5], 32)] * 2),
}

SCALES_AT = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "TQ1_0": [52],
    "TQ2_0": [64],
}


def random_rows(name: str, rows: int = 7, blocks: int = 3) -> np.ndarray:
    """Any bits for the codes, scales of a usual size."""
    rng, block_type = np.random.default_rng(5), TYPES[name]
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((rows, blocks)).astype(np.float32)
        return {"F32": values, "F16": values.astype(np.float16), "BF16": values.view(np.uint16)[:, 1::2].copy()}[
            name
        ].view(np.uint8)
    raw = rng.integers(0, 256, (rows, blocks, block_type.block_bytes), np.uint8)
    for at in SCALES_AT[name]:
        raw[..., at : at + 2] = rng.uniform(-0.1, 0.1, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", TYPES)
def test_decode_equals_an_independent_package(name):
    raw = random_rows(name)
    values = decode_rows(TYPES[name], raw)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, gguf.dequantize(raw, gguf.GGMLQuantizationType[name]))
    assert raw.shape[1] == row_bytes(TYPES[name], values.shape[1])


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_decode_undoes_an_independent_quantizer(name):
    values = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    raw = gguf.quantize(values, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(decode_rows(TYPES[name], raw), values, atol=0.4 if "Q4" in name else 0.2)


@pytest.mark.parametrize("name", BY_HAND)
def test_decode_of_a_block_written_by_hand(name):
    data, expected = BY_HAND[name]
    assert decode_rows(TYPES[name], np.frombuffer(data, np.uint8)[None]).tolist() == [expected]


def values_of(name: str, raw: np.ndarray) -> np.ndarray:
    """What the repacked codes stand for."""
    repacked = repack_rows(TYPES[name], raw)
    assert repacked.codes.dtype == {"F32": np.float32, "F16": np.float16}.get(name, np.uint8)
    assert all(part is None or part.dtype == np.float16 for part in (repacked.scale, repacked.minimum))
    return quant.get(TYPES[name].keep).dequantize(repacked)


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0"])
def test_repacked_values_are_exactly_those_decoded(name):
    raw = random_rows(name)
    np.testing.assert_array_equal(values_of(name, raw), decode_rows(TYPES[name], raw))


def test_q4_k_is_repacked_up_to_the_rounding_of_its_scales():
    raw = random_rows("Q4_K")
    values = decode_rows(TYPES["Q4_K"], raw)
    np.testing.assert_allclose(values_of("Q4_K", raw), values, atol=np.abs(values).max() * 2**-10)


@pytest.mark.parametrize("name", ["BF16", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K"])
def test_types_without_exact_codes_are_not_repacked(name):
    assert repack_rows(TYPES[name], random_rows(name)) is None


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("byte", [0x7B, 0x7C, 0x7F, 0xFC, 0xFF])
def test_values_out_of_range_give_no_warning(name, byte):
    raw = np.full((2, TYPES[name].block_bytes), byte, np.uint8)
    decode_rows(TYPES[name], raw)
    repack_rows(TYPES[name], raw)
