"""Ternary matrices in Hugging Face checkpoints: BitNet, and models that were trained on to be like it.

`quantization_config` in a config.json says how they are stored:

    offline   codes 0, 1, 2 for -s, 0, s, four to a byte; s, or its inverse, is a tensor of its own, NAME_scale. Of n
              rows that are stored, row r % n has row r of the matrix, in the two bits from 2 * (r // n) on
    online    weights as they were trained, to be rounded to -s, 0, s, where s is the mean of a matrix's magnitudes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from edgellm.arrays import F32, U8
from edgellm.config import one_of, require
from edgellm.errors import CheckpointError

from .blocks import BYTE, BlockType, decode_rows
from .checkpoint import SourceTensor

ROWS_AT_ONCE = 256


def with_ternary(
    settings: Mapping[str, Any], found: Mapping[str, SourceTensor], others: Collection[str]
) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint, its ternary matrices as such; `settings` is the quantization_config, `others` are
    matrices that are not ternary.

    Raises UnsupportedError for what is not described above, CheckpointError for a scale that is missing.
    """
    require(settings, "use_rms_norm", False)
    require(settings, "modules_to_not_convert", ["lm_head"])
    if one_of(settings, "quantization_mode", ["offline", "online"], "offline") == "online":
        trained = {name for name, tensor in found.items() if len(tensor.shape) == 2} - set(others)
        return {name: _rounded(tensor) if name in trained else tensor for name, tensor in found.items()}
    inverse = one_of(settings, "linear_class", ["bitlinear", "autobitlinear"], "bitlinear") == "bitlinear"
    packed = {name: f"{name}_scale" for name, tensor in found.items() if tensor.type is BYTE and len(tensor.shape) == 2}
    for name, scale in packed.items():
        if scale not in found or math.prod(found[scale].shape) != 1:
            raise CheckpointError(f"{name} has ternary codes; expected a number beside it, {scale}: fetch it again")
    return {
        name: _unpacked(tensor, found[packed[name]], inverse) if name in packed else tensor
        for name, tensor in found.items()
        if name not in packed.values()
    }


def _unpacked(packed: SourceTensor, scale: SourceTensor, inverse: bool) -> SourceTensor:
    stored, cols = packed.shape

    def read(first: int, stop: int) -> U8:
        quarters = [(max(first - q * stored, 0), min(stop - q * stored, stored), 2 * q) for q in range(4)]
        return np.concatenate([packed.read(start, end) >> shift & 3 for start, end, shift in quarters if start < end])

    @cache
    def number() -> float:
        value = np.float32(decode_rows(scale.type, scale.read(0, 1))[0, 0])
        with np.errstate(divide="ignore"):  # the converter finds what is not finite
            return float(1 / value if inverse else value)

    return SourceTensor(packed.name, (4 * stored, cols), _codes_and(number), read)


def _rounded(trained: SourceTensor) -> SourceTensor:
    rows, cols = trained.shape

    def values(first: int, stop: int) -> F32:
        return decode_rows(trained.type, trained.read(first, stop))

    @cache
    def mean() -> float:
        parts = (values(first, min(first + ROWS_AT_ONCE, rows)) for first in range(0, rows, ROWS_AT_ONCE))
        total = sum(float(np.abs(part).sum(dtype=np.float64)) for part in parts)
        return float(np.float32(max(total / (rows * cols), 1e-5)))

    def read(first: int, stop: int) -> U8:
        with np.errstate(invalid="ignore"):  # the mean is not finite either
            steps: F32 = np.rint(values(first, stop) / np.float32(mean()))
            return np.asarray(steps.clip(-1, 1) + 1, np.uint8)

    return replace(trained, type=_codes_and(mean), read=read)


def _codes_and(scale: Callable[[], float]) -> BlockType:
    """A code in each byte."""
    return BlockType("ternary", 1, 1, "q2t", lambda codes: (codes.astype(np.float32) - 1) * np.float32(scale()))
