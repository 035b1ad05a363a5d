"""Logits -> the next id: small functions on logits, composed by `Sampler` in the order that llama.cpp has.

Each transform takes and gives (tokens,) float32 logits; -inf excludes a token. Randomness is a generator that is passed
in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgellm.arrays import F32
from edgellm.errors import ArgumentError, BackendError

REPEAT_WINDOW = 64
"""Tokens back from the end that the repetition penalty looks at."""
BLOCK = 64
"""Logits of which top-k looks at the largest first."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy: always the likeliest token."""

    temperature: float = 0.8
    top_k: int = 40
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the likeliest one's probability; 0 keeps all."""
    repeat_penalty: float = 1.0
    """Divide the odds of recent tokens by this; 1 changes nothing."""
    seed: int | None = None
    """For the same tokens again; None draws a new one."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, math.inf)
        _check("top_k", self.top_k, 0, math.inf)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("seed", self.seed or 0, 0, 2.0**64)
        if not (self.repeat_penalty > 0 and math.isfinite(self.repeat_penalty)):
            raise ArgumentError(f"repeat_penalty is {self.repeat_penalty}; expected a positive number")


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        expected = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise ArgumentError(f"{name} is {value}; expected a number {expected}")


class Chooser(Protocol):
    """What generation asks for the next token."""

    takes_best: bool
    """Always the largest logit as the model computed it: then only that token need be known of a row."""

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow the last token that was chosen."""

    def __call__(self, logits: F32, ids: Sequence[int]) -> int:
        """(tokens,) logits and the ids so far -> the next id."""


class Sampler:
    """sampler(logits, ids so far) -> the next id, as the parameters say; it holds its own random generator."""

    takes_best: bool
    is_done = False

    def __init__(self, params: SamplingParams) -> None:
        self._params, self._rng = params, np.random.default_rng(params.seed)
        self.takes_best = params.temperature == 0 and params.repeat_penalty == 1

    def __call__(self, logits: F32, ids: Sequence[int]) -> int:
        params = self._params
        if params.repeat_penalty != 1:
            logits = repeat_penalty(logits, ids[-REPEAT_WINDOW:], params.repeat_penalty)
        best = greedy(logits)  # refuses NaN
        if params.temperature == 0:
            return best
        logits = top_k(logits, params.top_k)
        candidates = np.flatnonzero(logits > -np.inf)  # so that what follows need not sort the vocabulary
        logits = min_p(top_p(logits[candidates], params.top_p), params.min_p)
        return int(candidates[draw(logits / np.float32(params.temperature), self._rng)])


def greedy(logits: F32) -> int:
    """The likeliest token, the first of equals."""
    best = int(logits.argmax())
    return checked(-1 if math.isnan(logits[best]) else best)


def checked(best: int) -> int:
    """A best token as backends give it; raises BackendError for -1."""
    if best < 0:
        raise BackendError("the model computed logits that are not numbers; its weights are damaged or too coarse")
    return best


def repeat_penalty(logits: F32, recent: Sequence[int], penalty: float) -> F32:
    """Make recent tokens less likely (arXiv:1909.05858): a positive logit is divided, a negative one multiplied."""
    seen = np.unique(np.asarray(recent, np.intp))
    logits = logits.copy()
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def top_k(logits: F32, k: int) -> F32:
    """Keep the k largest; ties with the last of them stay too."""
    if not 0 < k < len(logits):
        return logits
    return _keep(logits, logits >= _largest(logits, k))


def _largest(logits: F32, k: int) -> np.float32:
    """The k-th largest. The largest of blocks bound it from below, so that few logits have to be put in order."""
    blocks = logits[: len(logits) // BLOCK * BLOCK].reshape(-1, BLOCK)
    if len(blocks) > k:
        logits = logits[logits >= np.partition(blocks.max(axis=1), -k)[-k]]
    return np.partition(logits, -k)[-k]  # type: ignore[no-any-return]


def top_p(logits: F32, p: float) -> F32:
    """Keep the likeliest tokens until their probabilities sum to p (arXiv:1904.09751); always at least one."""
    if p >= 1:
        return logits
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(_softmax(logits[order])) - _softmax(logits[order])
    keep = np.zeros(len(logits), bool)
    keep[order] = before < p
    keep[order[0]] = True
    return _keep(logits, keep)


def min_p(logits: F32, p: float) -> F32:
    """Keep tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""
    return logits if p == 0 else _keep(logits, logits >= logits.max() + math.log(p))


def draw(logits: F32, rng: np.random.Generator) -> int:
    """A token at random, by its probability."""
    greedy(logits)  # refuses NaN
    candidates = np.flatnonzero(logits > -np.inf)
    cumulative = np.cumsum(_softmax(logits[candidates].astype(np.float64)))
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(candidates[min(int(place), len(candidates) - 1)])


def _keep(logits: F32, keep: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> F32:
    return np.where(keep, logits, np.float32(-np.inf))


def _softmax(logits: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> F32:
    e = np.exp(logits - logits.max())
    return e / e.sum()  # type: ignore[no-any-return]
