"""Tokens that move up in a context when some before them are dropped: what RoPE has made of their keys is turned back.

A key of position p is turned by p * frequency; turned by -n * frequency it is the key of position p - n. Values, keys
that know no position and what convolutions read stay as they are.
"""

from __future__ import annotations

import numpy as np

from edgellm.arrays import F32
from edgellm.errors import UnsupportedError
from edgellm.plan import Embed, Plan, RopeAppend


class Moves:
    """How the keys of a model's layers move."""

    def __init__(self, plan: Plan) -> None:
        """Raises UnsupportedError for a model whose tokens cannot."""
        if any(isinstance(op, Embed) and op.by_position for op in plan.ops):
            raise UnsupportedError(
                "this model has learned positions, so what it remembers of a token cannot move to another; expected a "
                "model with RoPE for overflow 'window': use 'shift'"
            )
        self._keys = {op.layer: op.k for op in plan.ops if isinstance(op, RopeAppend)}

    def turned(self, layer: int, keys: F32, n: int) -> F32:
        """Keys (positions, n_kv_heads, head_dim) of a layer, for n positions before theirs."""
        made = self._keys[layer]
        if made.frequencies is None:
            return keys
        # A norm of what was turned has scaled each dimension by itself; the norm is the same for all angles.
        norm = made.turned_norm
        scale: F32 = norm.weight.data[: made.head_dim] if norm else np.ones(made.head_dim, np.float32)
        if norm and not scale.all():
            raise UnsupportedError(
                f"{norm.weight.name} has zeros, so keys cannot be turned back for overflow 'window': use 'shift'"
            )
        unscaled: F32 = keys / scale
        return rotated(unscaled, made.frequencies, -n) * scale


def rotated(keys: F32, frequencies: F32, n: int) -> F32:
    """The pairs (i, i + len(frequencies)) of the last axis, turned by n * frequencies[i]."""
    size, angles = len(frequencies), n * frequencies.astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second, rest = np.split(keys, [size, 2 * size], axis=-1)
    result: F32 = np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return result
