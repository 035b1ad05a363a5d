"""Texts that end a repeat -> sequences of tokens in which they may come: what the sampler `dry` is given."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from edgellm.errors import ArgumentError
from edgellm.tokenizer import Tokenizer


def breakers(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[int, list[tuple[int, ...]]]:
    """{token in which a text begins: the tokens that may follow it}: none where the text is in the one token.

    As in llama.cpp, what is left of the text after the first token is tokenized by itself.
    """
    if "" in texts:
        raise ArgumentError("a dry_sequence_breaker is empty; expected at least one character")
    found: dict[int, list[tuple[int, ...]]] = {}
    for text in dict.fromkeys(texts):
        for id in range(tokenizer.n_tokens):
            for tail in _tails(tokenizer, tokenizer.token_bytes(id), text.encode()):
                if tail not in (tails := found.setdefault(id, [])):
                    tails.append(tail)
    return found


def _tails(tokenizer: Tokenizer, token: bytes, text: bytes) -> list[tuple[int, ...]]:
    if text in token:
        return [()]
    begun = [size for size in range(1, min(len(token) + 1, len(text))) if token.endswith(text[:size])]
    tails = []
    for size in begun:
        with suppress(UnicodeDecodeError):  # within a character there is nothing to tokenize
            tails.append(tuple(tokenizer.encode(text[size:].decode(), add_special=False, parse_special=False)))
    return tails
