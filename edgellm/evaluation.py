"""Log-likelihoods of a task's answers, as lm-evaluation-harness computes them; several questions at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from edgellm.api import Model
from edgellm.arrays import F32
from edgellm.backends import best_tokens
from edgellm.errors import ArgumentError, ContextOverflowError
from edgellm.generate import Slot, evaluate
from edgellm.perplexity import token_losses
from edgellm.samplers import checked
from edgellm.tasks import Answer, Question

LANES = 16
"""Questions in work at once: an answer has a dozen tokens or so, and a step is to be full."""


class Scored(NamedTuple):
    """A context and its continuation in tokens."""

    ids: list[int]
    n_scored: int
    """The last ones, of the continuation."""
    n_cut: int
    """Tokens of the context that were left out at its front, because the model's context does not hold all."""


def tokenized(model: Model, question: Question) -> list[Scored]:
    """The answers of a question.

    Raises ArgumentError for a continuation without a token of its own, ContextOverflowError for one that does not fit.
    """
    return [_scored(model, context, continuation) for context, continuation in question.answers]


def _scored(model: Model, context: str, continuation: str) -> Scored:
    whole = model.tokenize(f"{context} {continuation}", add_special=False)
    before = model.tokenize(context.rstrip(), add_special=False)
    after = whole[len(before) :]
    if not after:
        raise ArgumentError(f"the answer {continuation[:80]!r} has no token of its own after {context[-40:]!r}")
    if len(after) > model.context_length:
        raise ContextOverflowError(
            f"the answer {continuation[:80]!r} has {len(after)} tokens; the context holds {model.context_length}"
        )
    ids = [*_start(model, before), *before, *after]
    n_cut = max(0, len(ids) - 1 - model.context_length)  # the last token is scored, not evaluated
    return Scored(ids[n_cut:], len(after), n_cut)


def _start(model: Model, before: Sequence[int]) -> Sequence[int]:
    """BOS where the model wants it; before a context without tokens there must be something."""
    ends = model.info.eos_ids[:1]
    starts = ends if model.info.bos_id is None else (model.info.bos_id,)
    if not before and not starts:
        raise ArgumentError("a context has no tokens, and this model has none to begin with; give a longer context")
    return starts if model.tokenizer.adds_bos or not before else ()


def answers(model: Model, questions: Sequence[Sequence[Scored]]) -> Iterator[tuple[int, list[Answer]]]:
    """(number of a question, what the model says of its answers), in the order in which they are done.

    Raises BackendError if the model computes logits that are not numbers.
    """
    waiting, done = iter(enumerate(questions)), list[tuple[int, list[Answer]]]()
    slots = [model.open_slot() for _ in range(min(LANES, len(questions)))]
    try:
        lanes = [_lane(slot, waiting, done) for slot in slots]
        wants = {lane: next(lane) for lane in lanes}
        while wants:
            parts = _fitting(wants, slots[0].max_rows)
            logits, at = evaluate(list(parts.values()), slots[0].backend.run), 0
            for lane, (_, _, wanted) in parts.items():
                del wants[lane]
                with suppress(StopIteration):
                    wants[lane] = lane.send(logits[at : at + len(wanted)])
                at += len(wanted)
            yield from done
            done.clear()
    finally:
        for slot in slots:
            slot.close()


_Part = tuple[Slot, Sequence[int], range]
"""More tokens of a slot, and those of them whose logits are wanted."""
_Lane = Generator[_Part, F32, None]


def _lane(slot: Slot, waiting: Iterator[tuple[int, Sequence[Scored]]], done: list[tuple[int, list[Answer]]]) -> _Lane:
    """Take questions, yield what is to be evaluated, get the logits of as much of it as was."""
    for number, question in waiting:
        found = []
        for answer in question:
            found.append((yield from _answer(slot, answer)))
        done.append((number, found))


def _answer(slot: Slot, scored: Scored) -> Generator[_Part, F32, Answer]:
    """What the slot holds of the context, from the answer before, is not evaluated again."""
    inputs, targets = scored.ids[:-1], scored.ids[-scored.n_scored :]
    first = len(inputs) - len(targets)  # whose logits are of the first target
    slot.trim(min(slot.common(scored.ids), first))
    best, losses = list[int](), list[float]()
    while len(slot.ids) < len(inputs):
        held = len(slot.ids)
        logits = yield slot, inputs[held:], range(max(0, first - held), len(inputs) - held)
        best += map(checked, best_tokens(logits).tolist())
        losses += token_losses(logits, targets[len(losses) : len(losses) + len(logits)]).tolist()
    return Answer(-sum(losses), best == targets)


def _fitting(wants: Mapping[_Lane, _Part], room: int) -> dict[_Lane, _Part]:
    """As much of what the lanes want as a step of `room` tokens holds."""
    fitting = {}
    for lane, (slot, ids, wanted) in wants.items():
        n = min(len(ids), room)
        if n:
            fitting[lane] = slot, ids[:n], range(min(wanted.start, n), min(wanted.stop, n))
        room -= n
    return fitting
