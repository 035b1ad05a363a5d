"""Beam search: likely answers as a whole, where sampling looks at one token at a time. Knows no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.arrays import Array
from edgellm.generate import Slot, evaluate
from edgellm.samplers import checked


@dataclass(frozen=True, eq=False)
class Beam:
    """A beginning of an answer, or a whole one."""

    ids: list[int]
    """The one that ended it included."""
    logprobs: list[float]
    """Natural logarithms of the ids' probabilities, each given those before it."""
    slot: Slot
    """Whose cache has all of them but the last."""
    is_ended: bool = False

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)

    def score(self, length_penalty: float) -> float:
        return self.logprob / math.pow(len(self.ids), length_penalty)


def beam_search(
    new_slot: Callable[[], Slot],
    prompt: Sequence[int],
    n_beams: int,
    max_tokens: int,
    *,
    ends: Collection[int] = (),
    length_penalty: float = 1.0,
) -> list[Beam]:
    """Up to `n_beams` answers, the one of the highest score first: logprob / length ** length_penalty.

    After each token the `n_beams` likeliest beginnings go on, or end if their last token is one of `ends`. It is over
    at `max_tokens`, or when as many have ended and the likeliest beginning, if it ended here, would score less than all
    of them: the rule of Hugging Face's generate. The caches are closed when it returns.
    """
    slots = [new_slot()]
    try:
        live, whole = [Beam([], [], slots[0])], list[Beam]()
        for n_tokens in range(1, max_tokens + 1):
            grown = _grown(live, _logprobs(live, prompt), (1 + len(ends)) * n_beams, ends)
            whole += [beam for beam in grown[:n_beams] if beam.is_ended]
            live = _apart([beam for beam in grown if not beam.is_ended][:n_beams], slots, new_slot)
            if n_tokens == max_tokens:
                whole += live
            whole = sorted(whole, key=lambda beam: -beam.score(length_penalty))[:n_beams]
            best = max((beam.score(length_penalty) for beam in live), default=-np.inf)
            if not live or (len(whole) == n_beams and whole[-1].score(length_penalty) >= best):
                break
        return whole
    finally:
        for slot in slots:
            slot.close()


def _logprobs(live: Sequence[Beam], prompt: Sequence[int]) -> Array:
    """(beams, tokens) float64: of what may come next."""
    parts = []
    for beam in live:
        *before, last = [*prompt, *beam.ids][len(beam.slot.ids) :]
        if before:
            beam.slot.extend(before, wanted=range(0))
        parts.append((beam.slot, [last], range(1)))
    logits = evaluate(parts, live[0].slot.backend.run).astype(np.float64)
    best = logits.max(axis=1, keepdims=True)
    checked(-1 if np.isnan(best).any() else 0)
    logits -= best
    found: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def _grown(live: Sequence[Beam], logprobs: Array, n: int, ends: Collection[int]) -> list[Beam]:
    """The n likeliest of all beams with one token more, the likeliest first; of equals the first."""
    totals = (np.array([beam.logprob for beam in live])[:, None] + logprobs).ravel()
    n = min(n, len(totals))
    places = np.flatnonzero(totals >= np.partition(totals, -n)[-n])
    likeliest = places[np.argsort(-totals[places], kind="stable")][:n]
    grown = []
    for place, id in zip(*np.divmod(likeliest, logprobs.shape[1]), strict=True):
        beam = live[place]
        grown.append(
            Beam([*beam.ids, int(id)], [*beam.logprobs, float(logprobs[place, id])], beam.slot, int(id) in ends)
        )
    return grown


def _apart(beams: Sequence[Beam], slots: list[Slot], new_slot: Callable[[], Slot]) -> list[Beam]:
    """The beams, each in a slot of its own: the first that came out of one keeps it, the others get a copy."""
    free = [slot for slot in slots if all(slot is not beam.slot for beam in beams)]
    kept, apart = list[Slot](), list[Beam]()
    for beam in beams:
        slot = beam.slot
        if slot in kept:
            if not free:
                free.append(new_slot())
                slots += free
            slot = free.pop()
            slot.copy(beam.slot, len(beam.slot.ids))
        kept.append(slot)
        apart.append(Beam(beam.ids, beam.logprobs, slot))
    return apart
