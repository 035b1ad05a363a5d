"""Small functions on the (n,) float32 logits of some candidates: which may come next, and how likely each is.

A filter gives the places of those that stay, in ascending order; what changes how likely they are gives new logits. A
logit of -inf excludes a token. The definitions are llama.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edgellm.arrays import F32, Array
from edgellm.errors import ArgumentError, BackendError

BLOCKS = 64
"""Top-k looks at the largest of so many logits first."""
LARGEST = 1e30
"""That DRY takes off: what other samplers make of it is a float32 too."""
LIKELY = 64, 512, 4096
"""How many tokens are looked at, first and then, until they reach the probability of top-p."""


def greedy(logits: F32) -> int:
    """The likeliest token, the first of equals; raises BackendError for NaN, ArgumentError if nothing is left."""
    best = int(logits.argmax())
    if logits[best] == -np.inf:
        raise ArgumentError("no token may come next: all are excluded; loosen logit_bias or the banned strings")
    return checked(-1 if math.isnan(logits[best]) else best)


def checked(best: int) -> int:
    """A best token as backends give it; raises BackendError for -1."""
    if best < 0:
        raise BackendError("the model computed logits that are not numbers; its weights are damaged or too coarse")
    return best


def logit_bias(logits: F32, bias: Mapping[int, float]) -> F32:
    """Add to the logits of some tokens, of a whole vocabulary."""
    logits = logits.copy()
    logits[np.fromiter(bias, np.intp, len(bias))] += np.fromiter(bias.values(), np.float32, len(bias))
    return logits


def penalties(logits: F32, places: Array, repeat: float, frequency: float, presence: float) -> F32:
    """Make recent tokens less likely; `places` has the place of each, as often as it came.

    Divide a positive logit by `repeat`, multiply a negative one (arXiv:1909.05858); then take off `presence`, and
    `frequency` for each time.
    """
    seen, counts = np.unique(places, return_counts=True)
    logits = logits.copy()
    changed = np.where(logits[seen] > 0, logits[seen] / np.float32(repeat), logits[seen] * np.float32(repeat))
    logits[seen] = changed - (counts.astype(np.float32) * np.float32(frequency) + np.float32(presence))
    return logits


def repeats(recent: Sequence[int], breakers: Mapping[int, Sequence[tuple[int, ...]]]) -> dict[int, int]:
    """{token: how many of the last tokens it would repeat}: what came after the same ones earlier in `recent`.

    `breakers` are sequences of tokens that no repeat goes beyond, by their first token: what may follow it.
    """
    back = recent[::-1]
    unbroken = (_unbroken(back, i, breakers) for i, token in enumerate(back) if token in breakers)
    most = next((n for n in unbroken if n is not None), len(back))
    longest: dict[int, int] = {}
    for i, length in enumerate(_agreeing(back)):
        if i > 0:
            longest[back[i - 1]] = max(longest.get(back[i - 1], 0), min(length, most))
    return {token: length for token, length in longest.items() if () not in breakers.get(token, ())}


def _unbroken(back: Sequence[int], i: int, breakers: Mapping[int, Sequence[tuple[int, ...]]]) -> int | None:
    """Tokens that came after a breaker whose first is i tokens from the end; None if there is none."""
    following = tuple(back[i - 1 :: -1]) if i else ()
    tails = [len(tail) for tail in breakers[back[i]] if following[: len(tail)] == tail]
    return i - max(tails) if tails else None


def _agreeing(ids: Sequence[int]) -> list[int]:
    """For each place, how many tokens from there on are the first ones again (the Z function)."""
    found, left, right = [len(ids)], 0, 0  # ids[left:right] is ids[: right - left], the one that ends last
    for i in range(1, len(ids)):
        n = min(found[i - left], right - i) if i < right else 0
        while i + n < len(ids) and ids[n] == ids[i + n]:
            n += 1
        if i + n > right:
            left, right = i, i + n
        found.append(n)
    return found


def dry(logits: F32, places: Array, lengths: Array, multiplier: float, base: float, allowed_length: int) -> F32:
    """Take multiplier * base ** (length - allowed_length) off tokens that would repeat `length` tokens or more
    (github.com/oobabooga/text-generation-webui/pull/5677)."""
    largest = math.log(LARGEST)
    logs = [(length - allowed_length) * math.log(base) + math.log(multiplier) for length in lengths]
    logits = logits.copy()
    logits[places] -= np.exp(np.minimum(logs, largest)).astype(np.float32)
    return logits


def top_n_sigma(logits: F32, n: float) -> Array:
    """Keep logits at most n standard deviations below the largest (arXiv:2411.07641)."""
    return np.flatnonzero(logits >= logits.max() - np.float32(n) * logits[logits > -np.inf].std())


def top_k(logits: F32, k: int) -> Array:
    """Keep the k largest; ties with the last of them stay too."""
    places: Array = np.arange(len(logits)) if len(logits) < BLOCKS * k else _large(logits, k)
    k = min(k, len(places))
    stay: Array = places[logits[places] >= np.partition(logits[places], -k)[-k]]
    return stay


def _large(logits: F32, k: int) -> Array:
    """Places of the k largest and few others: the k-th largest of blocks' largest bounds them from below."""
    blocks = logits[: len(logits) // BLOCKS * BLOCKS].reshape(BLOCKS, -1)
    return np.flatnonzero(logits >= np.partition(blocks.max(axis=0), -k)[-k])


def typical(logits: F32, p: float) -> Array:
    """Keep the tokens whose surprise is nearest to what is expected, until their probabilities are more than p
    (arXiv:2202.00666)."""
    probabilities = softmax(logits)
    surprise = -np.log(probabilities, out=np.full_like(logits, -np.inf), where=probabilities > 0)
    order = np.argsort(np.abs(surprise - entropy(probabilities)), kind="stable")
    return np.sort(order[: np.searchsorted(np.cumsum(probabilities[order]), p, side="right") + 1])


def top_p(logits: F32, p: float) -> Array:
    """Keep the likeliest tokens until their probabilities sum to p (arXiv:1904.09751); always at least one."""
    probabilities = softmax(logits)
    for k in (*LIKELY, len(logits)):
        order, total = _likeliest(probabilities, min(k, len(logits)))
        if total[-1] >= p:
            break
    return np.sort(order[: np.searchsorted(total, p) + 1])


def _likeliest(probabilities: F32, k: int) -> tuple[Array, F32]:
    """The k likeliest tokens in order, and what the probabilities sum to up to each."""
    places = top_k(probabilities, k)
    order = places[np.argsort(-probabilities[places], kind="stable")]
    return order, np.cumsum(probabilities[order])


def min_p(logits: F32, p: float) -> Array:
    """Keep tokens at least p times as likely as the likeliest, p > 0 (arXiv:2407.01082)."""
    return np.flatnonzero(logits >= logits.max() + math.log(p))


def xtc(logits: F32, threshold: float) -> Array:
    """Of the tokens that are at least this probable, drop all but the least probable one; ties with it stay too
    (github.com/oobabooga/text-generation-webui/pull/6335)."""
    probabilities = softmax(logits)
    likely = probabilities[probabilities >= threshold]
    return np.flatnonzero(probabilities <= likely.min(initial=1))


def below_surprise(logits: F32, most: float) -> Array:
    """Keep tokens of at most so many bits of surprise; always the likeliest."""
    probabilities = softmax(logits)
    return np.flatnonzero(probabilities >= min(2.0 ** -max(most, 0.0), probabilities.max()))


def dynamic_temperature(logits: F32, temperature: float, spread: float, exponent: float) -> float:
    """From temperature - spread, where one token is sure, to temperature + spread, where all are alike."""
    candidates = int(np.count_nonzero(logits > -np.inf))
    if candidates < 2:
        return temperature
    low, high = max(0.0, temperature - spread), temperature + spread
    uncertainty = float(entropy(softmax(logits))) / math.log(candidates)
    share: float = max(0.0, uncertainty) ** exponent
    return low + (high - low) * share


def draw(logits: F32, rng: np.random.Generator) -> int:
    """A token at random, by its probability."""
    greedy(logits)  # refuses NaN
    candidates = np.flatnonzero(logits > -np.inf)
    cumulative = np.cumsum(softmax(logits[candidates].astype(np.float64)))
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(candidates[min(int(place), len(candidates) - 1)])


def entropy(probabilities: F32) -> np.floating:
    """In nats."""
    some = probabilities[probabilities > 0]
    return -np.dot(some, np.log(some))  # type: ignore[no-any-return]


def softmax(logits: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> F32:
    e = np.exp(logits - logits.max())
    return e / e.sum()  # type: ignore[no-any-return]
