"""The overflow policies: which tokens are dropped when a prompt does not fit the context, or an answer fills it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.errors import ArgumentError, ContextOverflowError

POLICIES = ("error", "shift", "window")
SINKS = 4
"""First tokens, which are always kept: models use them as attention sinks (arXiv:2309.17453)."""


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise ArgumentError(f"overflow is {policy!r}; expected {', '.join(POLICIES[:-1])} or {POLICIES[-1]}")


def fits(n_prompt: int, max_tokens: int | None, context_length: int) -> bool:
    """Whether the prompt leaves room for `max_tokens`, or for at least one token if there is no such limit."""
    return n_prompt + (1 if max_tokens is None else max_tokens) <= context_length


def most_left(max_tokens: int | None, context_length: int) -> int:
    """How many tokens of a prompt to keep if some must be dropped. At least a quarter of the context becomes free, so
    that a chat does not drop something, and evaluate the rest again, at every turn."""
    return context_length - max(max_tokens or 0, context_length // 4)


def without_oldest(ids: Sequence[int], n_first: int, most: int) -> list[int]:
    """The first `n_first` ids and the last ones, `most` altogether; all of them if `n_first` is no less than `most`."""
    return [*ids[:n_first], *ids[n_first + len(ids) - most :]] if n_first < most else list(ids)


@dataclass
class Window:
    """Overflow policy "window" for one answer: its first and its latest tokens stay in the context."""

    n_first: int
    n_latest: int
    """How many of the latest tokens must stay at least."""
    dropped: int = 0
    """How many tokens were dropped so far."""

    def check(self, context_length: int) -> None:
        """Raise ContextOverflowError if the tokens that must stay leave no room for others."""
        if self.n_first + self.n_latest >= context_length or 2 * self.n_first > context_length:
            raise ContextOverflowError(
                f"the first {self.n_first} and the latest {self.n_latest} tokens must stay in a context of "
                f"{context_length}; expected the first to take at most half of it, and both together less than all: "
                "shorten the system message, or load the model with a larger context"
            )

    def surplus(self, held: int) -> int:
        """How many tokens after the first ones to drop when the context is full: half of them, if so many may go."""
        return min((held - self.n_first + 1) // 2, held - self.n_first - self.n_latest)
