"""Text while it is being made: ids come in one by one, whole characters go out. Knows no model."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgellm.errors import ArgumentError

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer


LONGEST_CHARACTER = 4
"""Bytes in UTF-8."""


class TextStream:
    """Ids to text, piece by piece, as it goes on after the text of `context_ids`.

    The pieces together are what decode gives for all ids, less what it gives for the context. A piece never ends within
    a character; bytes that are no UTF-8 come out as U+FFFD when that is certain, at the latest by flush. Special tokens
    give no text.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._shown(self._end_of(context_ids))

    def push(self, id: int) -> str:
        return self._shown(self._bytes(id))

    def flush(self) -> str:
        """What is left at the end."""
        return self._shown(b"", final=True)

    def _end_of(self, ids: Sequence[int]) -> bytes:
        """As many of the last bytes as it takes to know which character is incomplete, and that one was before."""
        raw = b""
        for id in reversed(ids):
            raw = self._bytes(id) + raw
            if len(raw) >= LONGEST_CHARACTER:
                break
        return raw

    def _bytes(self, id: int) -> bytes:
        return b"" if self._tokenizer.is_special(id) else self._tokenizer.token_bytes(id)

    def _shown(self, raw: bytes, final: bool = False) -> str:
        text = self._decoder.decode(raw, final)
        if self._begun or not text:
            return text
        self._begun = True
        return self._tokenizer.without_space(text)


class StopStrings:
    """Text that ends where a stop string is complete. What may become one is held back until it is clear.

    What is shown depends on the text alone, never on how it is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ArgumentError for an empty stop string."""
        if "" in stops:
            raise ArgumentError("a stop string is empty; expected at least one character")
        self._stops, self._held = tuple(stops), ""
        self.found: str | None = None
        """The one that came."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string was found; after one there is no more text."""
        if self.found is not None:
            return "", True
        text = self._held + text
        # The one that is complete first; of two that end together the longer.
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at], True
        safe = len(text) - self._undecided(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
