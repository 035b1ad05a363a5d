"""Texts that an answer must not have: where one is complete, the answer goes back to the token in which it began."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

from edgellm.errors import ArgumentError
from edgellm.tokenizer import Tokenizer

MOST_REWINDS = 1000


class Banned:
    """What one answer says so far, and which tokens may not come at which place of it. Special tokens say nothing."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        if "" in texts:
            raise ArgumentError("a banned string is empty; expected at least one character")
        self._tokenizer, self._texts = tokenizer, [text.encode() for text in texts]
        self._longest = max(map(len, self._texts))
        self._said, self._starts = bytearray(), list[int]()
        self._excluded: dict[int, set[int]] = {}
        self._rewinds = 0

    def excluded(self, place: int) -> set[int]:
        """Tokens that may not come after the first `place` tokens of the answer."""
        return self._excluded.get(place, set())

    def review(self, answer: Sequence[int]) -> int:
        """Take in an answer that has grown; return how many of its tokens stay. The one after them is excluded there.

        Raises ArgumentError after MOST_REWINDS: nothing is found that may be said.
        """
        for place in range(len(self._starts), len(answer)):
            begin = len(self._said)
            self._starts.append(begin)
            self._said += self._bytes(answer[place])
            found = [at for text in self._texts if (at := self._said.find(text, max(0, begin - len(text) + 1))) >= 0]
            if found:
                return self._back_to(bisect_right(self._starts, min(found)) - 1, answer)
        return len(answer)

    def settled(self) -> int:
        """How many tokens stay, whatever comes: those before what may be the beginning of a banned text.

        What comes after that may go, and then the last token before it may be a beginning too.
        """
        place = len(self._starts)
        while (earlier := self._undecided(place)) < place:
            place = earlier
        return place

    def _undecided(self, n: int) -> int:
        """The place of the token, of the first `n`, in which a banned text may have begun; `n` if in none."""
        end = self._starts[n] if n < len(self._starts) else len(self._said)
        for begin in range(max(0, end - self._longest + 1), end):
            if any(text.startswith(self._said[begin:end]) for text in self._texts):
                return bisect_right(self._starts, begin) - 1
        return n

    def _back_to(self, place: int, answer: Sequence[int]) -> int:
        self._rewinds += 1
        if self._rewinds > MOST_REWINDS:
            raise ArgumentError(f"banned strings came {MOST_REWINDS} times in one answer; ban fewer, or longer ones")
        self._excluded = {at: tokens for at, tokens in self._excluded.items() if at <= place}
        said = self._bytes(answer[place])
        alone = self._with_banned if any(text in said for text in self._texts) else set()
        self._excluded[place] = self.excluded(place) | alone | {answer[place]}
        del self._said[self._starts[place] :], self._starts[place:]
        return place

    @cached_property
    def _with_banned(self) -> set[int]:
        """Tokens that have a banned text in them, so that they need not be tried one by one."""
        return {id for id in range(self._tokenizer.n_tokens) if any(text in self._bytes(id) for text in self._texts)}

    def _bytes(self, id: int) -> bytes:
        return b"" if self._tokenizer.is_special(id) else self._tokenizer.token_bytes(id)
