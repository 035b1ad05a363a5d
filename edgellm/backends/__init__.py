"""Backends: what runs a model's steps. One a file, found by its name; each has a class `Backend`."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Protocol, cast

import numpy as np

from edgellm.adapter import Adapter
from edgellm.architectures import Architecture
from edgellm.arrays import F32, I32, Array
from edgellm.errors import BackendError
from edgellm.footprint import Footprint
from edgellm.step import Step
from edgellm.tensor import Tensor


class Backend(Protocol):
    """A loaded model with a key/value cache for each open slot. Not for two threads at once."""

    MAX_ROWS: int
    """Most rows of one step."""
    CACHE_LAYOUT: str
    """What a slot's `content` is: another word where bytes come to stand elsewhere, or others are computed."""

    @property
    def footprint(self) -> Footprint:
        """The memory that it takes, with the adapters that it was made ready for and that somebody still holds."""

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        tensors: dict[str, Tensor],
        context_length: int,
        n_threads: int | None,
        kv: str = "f16",
    ) -> None:
        """`kv` is what keys and values are in its caches, of cache.KINDS."""

    def open_slot(self) -> int:
        """A new, empty slot for up to context_length tokens."""

    def close_slot(self, slot: int) -> None: ...

    def trim(self, slot: int, length: int) -> int:
        """Forget a slot's tokens from `length` on; return how many are left: `length`, or 0 if a sliding window has
        already dropped what the next token would need."""

    def copy(self, source: int, target: int, length: int) -> int:
        """Make a slot hold the first `length` tokens of another, in place of its own; return how many it holds:
        `length`, or 0 as `trim` does."""

    def kept(self, slot: int, length: int) -> int:
        """What `trim` would return."""

    def drop(self, slot: int, first: int, count: int) -> None:
        """Forget `count` of a slot's tokens from `first` on; those after them take their positions. What they saw of
        the ones that are gone stays in them. Raises UnsupportedError as `least_latest` does."""

    def least_latest(self) -> int:
        """How many tokens must be left after those that are dropped, as many as a sliding window sees; raises
        UnsupportedError for a model whose tokens cannot move."""

    def bytes_of(self, n_tokens: int) -> int:
        """Memory that a slot takes which has held so many tokens at most."""

    def content(self, slot: int) -> tuple[int, list[Array]]:
        """A number, and views of what a slot remembers, which are good until it changes: for `restore`."""

    def restore(self, slot: int, length: int, written: int) -> list[Array]:
        """Make a slot hold `length` tokens whose `content` had that number: -> views of its memory, of the same shapes,
        into which the caller copies the arrays."""

    def adapt(self, adapter: Adapter) -> None:
        """Make ready for steps with an adapter, which its first step does otherwise."""

    def run(self, step: Step) -> F32:
        """Evaluate the rows, append them to the caches: -> (wanted rows, vocab_size) logits."""

    def best(self, step: Step) -> I32:
        """As `run`, without the logits: -> (wanted rows,) tokens, what `best_tokens` makes of the logits."""

    def hidden(self, step: Step) -> F32:
        """As `run`, but what logits are computed from, the last norm's output: -> (rows, hidden_size), of all rows."""

    def close(self) -> None:
        """Let go of the tensors."""


def best_tokens(logits: F32) -> I32:
    """The token with the largest logit of each row, the first of equals; -1 if a logit of the row is not a number."""
    best = logits.argmax(axis=1)
    return np.where(np.isnan(logits[np.arange(len(logits)), best]), -1, best).astype(np.int32)


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> type[Backend]:
    """The backend class of that name; raises BackendError with the ones there are."""
    if name not in names():
        raise BackendError(f"backend {name!r} is not in this version; use one of: {', '.join(names())}")
    if name == "cpu" and find_spec("numba") is None:
        raise BackendError("backend 'cpu' needs numba, which is not installed; pip install numba, or use reference")
    return cast("type[Backend]", import_module(f"{__name__}.{name}").Backend)


def best() -> str:
    """The fastest backend that runs here: cpu, where Numba is installed and knows the CPU; else reference."""
    if find_spec("numba") is None or os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "reference"
    from edgellm import isa

    return "cpu" if isa.runnable() else "reference"
