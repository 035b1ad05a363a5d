"""What a model thinks before it answers: told apart from the answer, as it comes. Knows texts, and no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

OPEN, CLOSE = "<think>", "</think>"


class ThoughtReader:
    """Splits text, as it comes, into (whether it is a thought, text), without the tags around thoughts."""

    def __init__(self, thinking: bool = False) -> None:
        """`thinking`: the text begins with a thought."""
        self._thinking, self._held = thinking, ""

    def push(self, text: str) -> Iterator[tuple[bool, str]]:
        """What of it is certain; the beginning of a tag is held back."""
        self._held += text
        while (tag := CLOSE if self._thinking else OPEN) in self._held:
            before, self._held = self._held.split(tag, 1)
            if before:
                yield self._thinking, before
            self._thinking = not self._thinking
        safe = len(self._held) - _begun(self._held, tag)
        shown, self._held = self._held[:safe], self._held[safe:]
        if shown:
            yield self._thinking, shown

    def finish(self) -> Iterator[tuple[bool, str]]:
        """What was held back."""
        if self._held:
            yield self._thinking, self._held
        self._held = ""


def thoughts(pieces: Iterable[str], thinking: bool = False) -> Iterator[tuple[bool, str]]:
    """Text in pieces -> (whether it is a thought, text), wherever the tags are cut."""
    reader = ThoughtReader(thinking)
    for piece in pieces:
        yield from reader.push(piece)
    yield from reader.finish()


def is_thought_open(prompt: str) -> bool:
    """Whether a prompt ends within a thought, so that the answer begins there."""
    return prompt.rstrip().endswith(OPEN)


def _begun(text: str, tag: str) -> int:
    """How many characters at the end may be the beginning of a tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
