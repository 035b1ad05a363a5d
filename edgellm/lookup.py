"""Drafts of what comes next, looked up in the text so far: after the same few tokens often follow the same ones.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding). A draft costs no model; the model checks all of
it in one step, and what is wrong is taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAMS = (3, 2)
"""Numbers of last tokens that are looked for, the most first. A single one is followed by too many others."""


class Lookup:
    """The n-grams of one text, which grows, and how good the drafts were."""

    def __init__(self, most: int) -> None:
        self.most = most
        """Tokens of a draft."""
        self.drafted = self.accepted = 0
        self._follows: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """What followed the last time, or nothing: fewer tokens than agree with the text before.

        So a draft after two tokens is one token, and each that is right makes the next draft longer (as
        arXiv:2411.04975): where drafts are seldom right, little is lost by them.
        """
        self._index(ids)
        most = min(most, self.most)
        place = next((self._follows[key] for n in NGRAMS if (key := tuple(ids[-n:])) in self._follows), None)
        if place is None:
            return []
        length, period = _agreeing(ids, place, most + 1) - 1, len(ids) - place
        return [ids[place + i % period] for i in range(length)]

    def count(self, draft: Sequence[int], new: Sequence[int]) -> None:
        """Note a draft and what the model made of it: the tokens that were right, and one of its own."""
        self.drafted += len(draft)
        self.accepted += len(new) - 1

    def restart(self) -> None:
        """Take the text that comes next as a new one: some of its end is gone."""
        self._follows, self._indexed = {}, 0

    def _index(self, ids: Sequence[int]) -> None:
        """Note what follows each n-gram, as far as that is known; later ones take the place of earlier ones."""
        for place in range(self._indexed, len(ids)):
            for n in NGRAMS:
                if place >= n:
                    self._follows[tuple(ids[place - n : place])] = place
        self._indexed = len(ids)


def _agreeing(ids: Sequence[int], place: int, most: int) -> int:
    """How many tokens before `place` are the last ones too."""
    n = 0
    while n < min(most, place) and ids[place - 1 - n] == ids[-1 - n]:
        n += 1
    return n
