"""Perplexity of a text, computed as llama.cpp's llama-perplexity does, so that the numbers compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.api import Model
from edgellm.arrays import F32
from edgellm.errors import ArgumentError


@dataclass(frozen=True)
class Perplexity:
    value: float
    error: float
    """One standard error of `value`."""
    chunks: int
    tokens: int
    """Tokens that were scored."""


def perplexity(model: Model, text: str, context: int = 512, chunks: int | None = None) -> Iterator[Perplexity]:
    """The perplexity after each chunk of `context` tokens; the last one is the result.

    The text is tokenized once and cut into chunks that do not overlap. In each, the tokens of the second half are
    scored, given all before them in the chunk; where the model has a BOS, it takes the place of the first token.
    Raises ArgumentError for a text shorter than two chunks, or fewer than 4 tokens a chunk.
    """
    if not 4 <= context <= model.context_length:
        raise ArgumentError(f"chunks of {context} tokens; this model allows 4 to {model.context_length}")
    ids = model.tokenize(text)
    if len(ids) < 2 * context:
        raise ArgumentError(
            f"the text has {len(ids)} tokens; at least {2 * context} are needed for chunks of {context}"
        )
    if chunks is not None and chunks < 1:
        raise ArgumentError(f"{chunks} chunks; expected 1 or more")
    available = len(ids) // context
    losses: list[F32] = []
    slot = model.open_slot()
    try:
        for i in range(min(chunks or available, available)):
            chunk = ids[i * context : (i + 1) * context]
            if model.tokenizer.adds_bos and model.info.bos_id is not None:
                chunk[0] = model.info.bos_id
            slot.reuse([])
            losses.append(
                token_losses(slot.extend(chunk, wanted=range(context // 2, context - 1)), chunk[context // 2 + 1 :])
            )
            yield _summary(np.concatenate(losses), i + 1)
    finally:
        slot.close()


def token_losses(logits: F32, targets: Sequence[int]) -> F32:
    """-log p of each target: logits (n, vocab_size) -> (n,)."""
    return np.array([_loss(row, target) for row, target in zip(logits, targets, strict=True)])


def _loss(logits: F32, target: int) -> float:
    shifted = logits - logits.max()
    return math.log(np.exp(shifted).sum(dtype=np.float64)) - float(shifted[target])


def _summary(losses: F32, chunks: int) -> Perplexity:
    value, n = math.exp(losses.mean()), len(losses)
    variance = max(0.0, float(np.square(losses).mean() - losses.mean() ** 2))
    return Perplexity(value, value * math.sqrt(variance / (n - 1)) if n > 1 else math.inf, chunks, n)
