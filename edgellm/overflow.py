"""What is left of a prompt that does not fit the context, where the caller allows that its oldest part is left out."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.errors import ArgumentError

POLICIES = ("error", "shift")


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise ArgumentError(f"overflow is {policy!r}; expected {' or '.join(POLICIES)}")


def fits(n_prompt: int, max_tokens: int | None, context_length: int) -> bool:
    """Whether there is room for the answer that is asked for, or for a token at least."""
    return n_prompt + (1 if max_tokens is None else max_tokens) <= context_length


def most_left(max_tokens: int | None, context_length: int) -> int:
    """Tokens of a prompt that stay if some must go: besides the answer a quarter of the context is free then, so that
    not every turn of a chat loses something, and evaluates the rest again."""
    return context_length - max(max_tokens or 0, context_length // 4)


def without_oldest(ids: Sequence[int], n_first: int, most: int) -> list[int]:
    """The first `n_first` ids, and the last ones: `most` together; all where that is impossible."""
    return [*ids[:n_first], *ids[n_first + len(ids) - most :]] if n_first < most else list(ids)
