"""Rotary position embedding: the angle per position of each pair of a head (arXiv:2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellm.arrays import F32
from edgellm.config import number
from edgellm.errors import CheckpointError, UnsupportedError


def frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> F32:
    """Radians per position: (head_dim / 2,) float32.

    `scaling` stretches them for contexts longer than the model was trained on:
    {"type": "linear", "factor": f}; {"type": "llama3", ...} with Llama 3.1's four numbers; or
    {"type": "factors", "factors": [...]}, one divisor for each frequency.
    """
    base = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    stretched: F32 = (base / _divisors(base, scaling)).astype(np.float32)
    return stretched


def check_scaling(scaling: Mapping[str, Any] | None, head_dim: int) -> None:
    """Raise CheckpointError or UnsupportedError unless `frequencies` can use it."""
    _divisors(np.ones(head_dim // 2), scaling)


def _divisors(base: Any, scaling: Mapping[str, Any] | None) -> Any:
    kind = scaling["type"] if scaling else None
    if scaling is None or kind in ("default", "none"):
        return 1.0
    if kind == "linear":
        return number(scaling, "factor")
    if kind == "factors":
        factors = scaling.get("factors")
        if not isinstance(factors, list) or len(factors) != len(base):
            raise CheckpointError(f"rope scaling has the factors {str(factors)[:80]}; expected {len(base)} numbers")
        return np.array([number({"factor": factor}, "factor") for factor in factors])
    if kind == "llama3":
        return _llama3(base, scaling)
    raise UnsupportedError(f"rope scaling {kind!r} is not supported; this version has linear, llama3 and factors")


def _llama3(base: Any, scaling: Mapping[str, Any]) -> Any:
    """Slow waves are stretched, fast ones kept, those between blended (Llama 3.1 model card)."""
    factor, low, high = (number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise CheckpointError(f"rope scaling has high_freq_factor {high} <= low_freq_factor {low}")
    turns = number(scaling, "original_max_position_embeddings") * base / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / factor)
