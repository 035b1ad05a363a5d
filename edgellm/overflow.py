"""What is left of a prompt that does not fit the context, where the caller allows that its oldest part is left out; and
which tokens go when an answer fills the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.errors import ArgumentError, ContextOverflowError

POLICIES = ("error", "shift", "window")
SINKS = 4
"""First tokens that stay: models put on them the attention that nothing else deserves (arXiv:2309.17453)."""


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise ArgumentError(f"overflow is {policy!r}; expected {', '.join(POLICIES[:-1])} or {POLICIES[-1]}")


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


@dataclass
class Window:
    """What stays of one answer's context: the first tokens, and the latest."""

    n_first: int
    n_latest: int
    """The least of the latest ones that must stay."""
    dropped: int = 0
    """Tokens that have gone so far."""

    def check(self, context_length: int) -> None:
        """Raise ContextOverflowError if those that stay leave no room."""
        if self.n_first + self.n_latest >= context_length or 2 * self.n_first > context_length:
            raise ContextOverflowError(
                f"the first {self.n_first} tokens stay, and at least {self.n_latest} of the latest, in a context of "
                f"{context_length}; expected that the first take half of it at most, and both together less than all: "
                "shorten the system message, or load the model with a larger context"
            )

    def surplus(self, held: int) -> int:
        """How many tokens after the first go when there is no room: half of them, or what need not stay."""
        return min((held - self.n_first + 1) // 2, held - self.n_first - self.n_latest)
