"""Logits -> the next id: the functions of samplers.py as a user orders them, and the state that some of them have.

Randomness is one generator for each answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral
from typing import NamedTuple, Protocol

import numpy as np

from edgellm import samplers
from edgellm.arrays import F32, Array
from edgellm.errors import ArgumentError

Breakers = Mapping[int, Sequence[tuple[int, ...]]]
"""Sequences of tokens by their first: what may follow it. See edgellm.breakers."""
ORDER = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""Names and order as llama.cpp has them."""
LARGEST, MOST = 1e6, 2**31 - 1
"""Of numbers, so that no product of them is more than a float32 holds; and of whole ones."""
COLD = 1e-6
"""A temperature at which one token is left, and logits divided by it would soon be more than a float32 holds."""
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy: always the likeliest token. Defaults are llama.cpp's."""

    temperature: float = 0.8
    dynatemp_range: float = 0.0
    """Let the temperature go up and down by so much, as the model is less or more certain; 0 leaves it alone."""
    dynatemp_exponent: float = 1.0
    """How uncertainty, 0 to 1, becomes temperature: uncertainty ** exponent of the range."""
    top_k: int = 40
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the likeliest one's probability; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens nearest to the expected surprise that together exceed this probability; 1 keeps all."""
    top_n_sigma: float = -1.0
    """Keep logits at most so many standard deviations below the largest; 0 and less keep all."""
    xtc_probability: float = 0.0
    """How often the most likely choices are left out: all tokens of at least `xtc_threshold` but the last of them."""
    xtc_threshold: float = 0.1
    """From a probability above 0.5 on there is never more than one, so nothing is left out."""
    repeat_penalty: float = 1.0
    """Divide the odds of recent tokens by this; 1 changes nothing."""
    presence_penalty: float = 0.0
    """Take this off the logits of recent tokens."""
    frequency_penalty: float = 0.0
    """Take this off the logits of recent tokens for each time they came."""
    repeat_last_n: int = 64
    """Tokens back from the end that count as recent for the three penalties."""
    dry_multiplier: float = 0.0
    """Take multiplier * base ** (length - allowed_length) off a token that would repeat so many tokens; 0 is off."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    """Tokens back from the end in which repeats are looked for."""
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    """Texts that a repeat does not go beyond."""
    mirostat: int = 0
    """2 keeps the surprise of the text at `mirostat_tau` (arXiv:2007.14966), in place of all samplers but the
    temperature; 0 is off."""
    mirostat_tau: float = 5.0
    """Bits of surprise of a token."""
    mirostat_eta: float = 0.1
    """How fast the bound of surprise follows."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens, before all else; -inf excludes one."""
    samplers: Sequence[str] = ORDER
    """Which of them are applied, in this order."""
    seed: int | None = None
    """For the same tokens again; None draws a new one."""

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            _check(name, getattr(self, name), low, high)
        if self.seed is not None and check_count("seed", self.seed) >= 2**64:
            raise ArgumentError(f"seed is {self.seed}; expected at most {2**64 - 1}")
        if self.mirostat not in (0, 2):
            raise ArgumentError(f"mirostat is {self.mirostat}; expected 2, or 0 for none")
        if bad := [bias for bias in self.logit_bias.values() if not (abs(bias) <= LARGEST or bias == -math.inf)]:
            raise ArgumentError(
                f"a logit_bias is {bad[0]}; expected {-LARGEST:g} to {LARGEST:g}, or -inf to exclude a token"
            )
        if bad := [id for id in self.logit_bias if not isinstance(id, int)]:
            raise ArgumentError(f"logit_bias has {bad[0]!r}; expected ids of tokens, as numbers")
        for name in ("samplers", "dry_sequence_breakers"):
            if isinstance(getattr(self, name), str):
                raise ArgumentError(f"{name} has {getattr(self, name)!r}; expected a list of texts")
            object.__setattr__(self, name, check_texts(name, getattr(self, name)))
        self._check_samplers()

    @property
    def is_determined(self) -> bool:
        """Whether nothing is left to chance: the same logits get the same token."""
        is_greedy = self.temperature == self.dynatemp_range == self.xtc_probability == 0
        return self.seed is not None or is_greedy

    def _check_samplers(self) -> None:
        """What was asked for is applied, or refused: nothing is left out in silence."""
        if unknown := [name for name in self.samplers if name not in STAGES]:
            raise ArgumentError(f"samplers has {unknown[0]!r}; expected a list of: {', '.join(ORDER)}")
        if len(set(self.samplers)) < len(self.samplers):
            raise ArgumentError(f"samplers names one twice: {', '.join(self.samplers)}")
        used = ("temperature",) if self.mirostat else self.samplers
        for name in STAGES.keys() - set(used):
            if set_ := [key for key in STAGES[name].fields if getattr(self, key) != DEFAULTS[key]]:
                reason = "mirostat takes its place" if self.mirostat else f"samplers leaves out {name}"
                raise ArgumentError(f"{set_[0]} is {getattr(self, set_[0])}, but {reason}")


def check_count(name: str, value: int) -> int:
    """Raises ArgumentError for what is no whole number of 0 or more."""
    if not isinstance(value, Integral) or value < 0:
        raise ArgumentError(f"{name} is {value!r}; expected a whole number of 0 or more")
    return value


def check_texts(name: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Raises ArgumentError for what is no text that UTF-8 can write: then it has half a character."""
    for text in texts:
        if not isinstance(text, str) or SURROGATE.search(text):
            raise ArgumentError(f"{name} has {text!r}; expected text, of whole characters")
    return tuple(texts)


def _check(name: str, value: float, low: float, high: float) -> None:
    is_whole = isinstance(DEFAULTS[name], int)
    if not low <= value <= high or (is_whole and not isinstance(value, Integral)):
        kind = "a whole number" if is_whole else "a number"
        raise ArgumentError(f"{name} is {value}; expected {kind} of at least {low:g} and at most {high:g}")


class Candidates:
    """The tokens of one choice, as the samplers leave them."""

    def __init__(self, logits: F32, ids: Sequence[int], breakers: Breakers, rng: np.random.Generator) -> None:
        self.logits, self.ids, self.breakers, self.rng = logits, ids, breakers, rng
        self._tokens: Array | None = None

    def keep(self, places: Array) -> None:
        """Go on with some of the candidates."""
        self._tokens = places if self._tokens is None else self._tokens[places]
        self.logits = self.logits[places]

    def token(self, place: int) -> int:
        return place if self._tokens is None else int(self._tokens[place])

    def places(self, tokens: Sequence[int]) -> tuple[Array, Array]:
        """Which of these tokens are candidates, as indices into them, and at which places."""
        wanted = np.asarray(tokens, np.intp)
        if self._tokens is None:
            return np.arange(len(wanted)), wanted
        at = np.minimum(np.searchsorted(self._tokens, wanted), len(self._tokens) - 1)
        found = np.flatnonzero(self._tokens[at] == wanted)
        return found, at[found]


def _penalties(c: Candidates, p: SamplingParams) -> None:
    _, places = c.places(c.ids[-p.repeat_last_n :])
    c.logits = samplers.penalties(c.logits, places, p.repeat_penalty, p.frequency_penalty, p.presence_penalty)


def _dry(c: Candidates, p: SamplingParams) -> None:
    found = samplers.repeats(c.ids[-p.dry_penalty_last_n :], c.breakers)
    repeated = {token: length for token, length in found.items() if length >= p.dry_allowed_length}
    which, places = c.places(list(repeated))
    lengths = np.array(list(repeated.values()), np.intp)[which]
    c.logits = samplers.dry(c.logits, places, lengths, p.dry_multiplier, p.dry_base, p.dry_allowed_length)


def _xtc(c: Candidates, p: SamplingParams) -> None:
    if c.rng.random() < p.xtc_probability:
        c.keep(samplers.xtc(c.logits, p.xtc_threshold))


def _temperature(c: Candidates, p: SamplingParams) -> None:
    heat = p.temperature
    if p.dynatemp_range > 0:
        heat = samplers.dynamic_temperature(c.logits, heat, p.dynatemp_range, p.dynatemp_exponent)
    if heat > COLD:
        c.logits = c.logits / np.float32(heat)
    else:
        c.keep(np.array([c.logits.argmax()]))


class Stage(NamedTuple):
    """One sampler: what it makes of the candidates, and the fields of SamplingParams that are for it alone."""

    apply: Callable[[Candidates, SamplingParams], None]
    fields: tuple[str, ...]
    is_on: Callable[[SamplingParams], bool]
    keeps_best: bool = True
    """The largest logit stays the largest."""


STAGES = {
    "penalties": Stage(
        _penalties,
        ("repeat_penalty", "presence_penalty", "frequency_penalty", "repeat_last_n"),
        lambda p: (p.repeat_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0) and p.repeat_last_n > 0,
        keeps_best=False,
    ),
    "dry": Stage(
        _dry,
        ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
        lambda p: p.dry_multiplier > 0 and p.dry_penalty_last_n > 0,
        keeps_best=False,
    ),
    "top_n_sigma": Stage(
        lambda c, p: c.keep(samplers.top_n_sigma(c.logits, p.top_n_sigma)),
        ("top_n_sigma",),
        lambda p: p.top_n_sigma > 0,
    ),
    "top_k": Stage(lambda c, p: c.keep(samplers.top_k(c.logits, p.top_k)), ("top_k",), lambda p: p.top_k > 0),
    "typ_p": Stage(
        lambda c, p: c.keep(samplers.typical(c.logits, p.typical_p)),
        ("typical_p",),
        lambda p: p.typical_p < 1,
        keeps_best=False,
    ),
    "top_p": Stage(lambda c, p: c.keep(samplers.top_p(c.logits, p.top_p)), ("top_p",), lambda p: p.top_p < 1),
    "min_p": Stage(lambda c, p: c.keep(samplers.min_p(c.logits, p.min_p)), ("min_p",), lambda p: p.min_p > 0),
    "xtc": Stage(
        _xtc,
        ("xtc_probability", "xtc_threshold"),
        lambda p: p.xtc_probability > 0 and p.xtc_threshold <= 0.5,
        keeps_best=False,
    ),
    "temperature": Stage(
        _temperature,
        ("temperature", "dynatemp_range", "dynatemp_exponent"),
        lambda p: p.temperature != 1 or p.dynatemp_range > 0,
    ),
}
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, LARGEST), "dynatemp_range": (0, LARGEST), "dynatemp_exponent": (1 / LARGEST, LARGEST),
    "top_k": (0, MOST), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1), "top_n_sigma": (-LARGEST, LARGEST),
    "xtc_probability": (0, 1), "xtc_threshold": (0, 1), "repeat_penalty": (1 / LARGEST, LARGEST),
    "presence_penalty": (-LARGEST, LARGEST), "frequency_penalty": (-LARGEST, LARGEST), "repeat_last_n": (0, MOST),
    "dry_multiplier": (0, LARGEST), "dry_base": (1, LARGEST), "dry_allowed_length": (0, MOST),
    "dry_penalty_last_n": (0, MOST), "mirostat_tau": (0, LARGEST), "mirostat_eta": (0, LARGEST),
}  # fmt: skip
DEFAULTS = {made.name: made.default for made in fields(SamplingParams)}


class Chooser(Protocol):
    """What generation asks for the next token."""

    takes_best: bool
    """Always the largest logit as the model computed it: then only that token need be known of a row."""

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow the last token that was chosen."""

    def __call__(self, logits: F32, ids: Sequence[int]) -> int:
        """(tokens,) logits and the ids so far -> the next id."""

    def rewind(self, n: int) -> None:
        """Go back `n` tokens: others come in their place."""


class Sampler:
    """sampler(logits, ids so far) -> the next id, as the parameters say; it holds its own random generator.

    It is called once for each token of an answer, in order.
    """

    takes_best: bool
    is_done = False

    def __init__(self, params: SamplingParams, breakers: Breakers | None = None) -> None:
        """`breakers` are what the params' dry_sequence_breakers are in tokens: see edgellm.breakers."""
        self._params, self._breakers = params, breakers or {}
        self._most_surprise = [2 * params.mirostat_tau]  # before each token, and the next
        used = ("temperature",) if params.mirostat else params.samplers
        stages = [STAGES[name] for name in used if STAGES[name].is_on(params)]
        self._greedy = params.temperature == params.dynatemp_range == 0
        self._stages = [stage for stage in stages if not (self._greedy and stage.keeps_best)]
        self.takes_best = self._greedy and not self._stages and not params.logit_bias

    @cached_property
    def _rng(self) -> np.random.Generator:
        """Made when it is asked for: numpy.random takes as long to import as a token to decode."""
        return np.random.default_rng(self._params.seed)

    def __call__(self, logits: F32, ids: Sequence[int]) -> int:
        params = self._params
        if params.logit_bias:
            logits = samplers.logit_bias(logits, params.logit_bias)
        samplers.greedy(logits)  # refuses NaN
        left = Candidates(logits, ids, self._breakers, self._rng)
        for stage in self._stages:
            stage.apply(left, params)
        if self._greedy:
            return left.token(samplers.greedy(left.logits))
        return left.token(self._unsurprising(left) if params.mirostat else samplers.draw(left.logits, self._rng))

    def rewind(self, n: int) -> None:
        """Go back `n` tokens; random numbers are not drawn again."""
        if self._params.mirostat:
            del self._most_surprise[len(self._most_surprise) - n :]

    def _unsurprising(self, left: Candidates) -> int:
        """Draw from what is below the bound of surprise, and move that by how far the token was from tau."""
        left.keep(samplers.below_surprise(left.logits, self._most_surprise[-1]))
        place = samplers.draw(left.logits, self._rng)
        surprise = -math.log2(samplers.softmax(left.logits)[place])
        error = surprise - self._params.mirostat_tau
        self._most_surprise.append(self._most_surprise[-1] - self._params.mirostat_eta * error)
        return place
