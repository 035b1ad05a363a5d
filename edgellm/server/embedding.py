"""Texts of a request -> their vectors, beside the answers to other requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm.api import Model
from edgellm.arrays import F32
from edgellm.server.errors import RequestError
from edgellm.server.grouped import collected
from edgellm.server.service import Call


async def embedded(call: Call, texts: Sequence[Sequence[int]], pooling: str = "mean") -> list[F32]:
    """The vectors of texts that were checked: (hidden_size,) float32 of length 1."""
    return await collected(call, call.served.model.embed_groups(texts, pooling), sum(map(len, texts)))


def check_dimensions(model: Model, asked: int | None) -> None:
    """Raise RequestError for more than there are."""
    if asked is not None and asked > model.config.hidden_size:
        raise RequestError(
            f"dimensions is {asked}; expected at most {model.config.hidden_size}, which this model has",
            param="dimensions",
        )


def shortened(vector: F32, dimensions: int | None) -> F32:
    """The first so many numbers, of length 1 again: as models want it that are trained for it."""
    if dimensions is None or dimensions >= len(vector):
        return vector
    cut = vector[:dimensions]
    found: F32 = cut / max(np.linalg.norm(cut), np.float32(1e-30))
    return found
