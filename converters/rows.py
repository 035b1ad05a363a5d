"""Where the rows of a matrix go in a .edge file, and how many are in work at once."""

from __future__ import annotations

import numpy as np

from edgellm import quant
from edgellm.arrays import Array

CHUNK = 1 << 20
"""Weights in work at once: bounds the memory that a conversion takes, whatever the model's size."""


def row_order(rows: int, pair: int, n_sources: int, head_dim: int) -> Array:
    """Where the rows that are stored come from, in rows of each source one after the other."""
    order = np.arange(rows * n_sources)
    if head_dim:  # RoPE pairs (2i, 2i+1) -> (i, i + head_dim/2)
        order = order.reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return order[quant.paired(len(order), pair if n_sources == 1 else rows)] if pair else order


def joined(quantized: list[quant.Quantized], order: Array) -> quant.Quantized:
    """The rows of several, one after the other, then put in an order."""
    columns = zip(*quantized, strict=True)
    return quant.Quantized(*(None if c[0] is None else np.concatenate(c)[order] for c in columns))  # type: ignore[arg-type]
