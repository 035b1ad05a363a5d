"""A low-rank adapter (LoRA, arXiv:2106.09685): matrices W of a model become W + b @ a. Knows no file and no backend."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from edgellm.arrays import F32


class LowRank(NamedTuple):
    """What is added to a matrix of (rows, cols): b @ a."""

    a: F32
    """(rank, cols)."""
    b: F32
    """(rows, rank), scaled."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """Made by Model.load_adapter. Any number of a model's chats and answers may use it."""

    name: str
    base: str
    """The fingerprint of the model that it was loaded for."""
    pairs: Mapping[str, LowRank]
    """By the names of the model's matrices."""

    @property
    def n_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())

    @cached_property
    def fingerprint(self) -> str:
        """Another one for other values or another scale."""
        digest = hashlib.sha256()
        for name, pair in sorted(self.pairs.items()):
            digest.update(f"{name} {pair.a.shape} {pair.b.shape}\n".encode())
            for array in pair:
                digest.update(np.ascontiguousarray(array).data.cast("B"))
        return digest.hexdigest()


def combined(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that adds what all of them add; they are of one model."""
    if len(adapters) == 1:
        return adapters[0]
    pairs = {
        name: stacked([adapter.pairs[name] for adapter in adapters if name in adapter.pairs])
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs)
    }
    return Adapter(" + ".join(adapter.name for adapter in adapters), adapters[0].base, pairs)


def stacked(pairs: Sequence[LowRank]) -> LowRank:
    """The sum of what several add to one matrix."""
    if len(pairs) == 1:
        return pairs[0]
    return LowRank(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs], axis=1))
