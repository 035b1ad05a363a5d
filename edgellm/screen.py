"""What a person sees of a conversation: text as it comes, Markdown where the terminal can show it, notes, thoughts.

The extra `chat` (rich, prompt_toolkit) makes it pleasant; without it, or where output is no terminal, all is plain
text. NO_COLOR and TERM=dumb are respected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from edgellm.thoughts import thoughts

if TYPE_CHECKING:
    from rich.live import Live

REFRESHES = 10
"""Times a second at most that a block which is not complete yet is drawn again."""


def screen() -> Screen:
    """The best that this terminal shows."""
    if is_rich_terminal() and find_spec("rich"):
        return MarkdownScreen()
    return Screen()


def is_rich_terminal() -> bool:
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return terminal and os.environ.get("TERM") != "dumb"


class Screen:
    """Plain text."""

    def __init__(self) -> None:
        self.shows_thoughts = True

    def answer(self, pieces: Iterable[str], thinking: bool = False) -> None:
        """Show an answer while it comes; `thinking`: it begins with thoughts that the prompt has opened."""
        try:
            for thought, text in thoughts(pieces, thinking):
                if thought:
                    self._thought(text)
                else:
                    self._text(text)
        finally:
            self._end()

    def note(self, text: str) -> None:
        """Something that is not the model's."""
        click.echo(_styled(text, dim=True), err=True)

    def error(self, error: Exception) -> None:
        click.echo(_styled(f"Error: {error}", fg="red"), err=True)

    def _thought(self, text: str) -> None:
        if self.shows_thoughts:
            click.echo(_styled(text, dim=True), nl=False)

    def _text(self, text: str) -> None:
        click.echo(text, nl=False)

    def _end(self) -> None:
        click.echo()


class MarkdownScreen(Screen):
    """Each block of Markdown is drawn anew while it grows, and stays once it is complete."""

    def __init__(self) -> None:
        from rich.console import Console

        super().__init__()
        self._console, self._block = Console(highlight=False), ""
        self._live: Live | None = None

    def _thought(self, text: str) -> None:
        if self.shows_thoughts:
            self._flush()
            self._console.print(text, end="", style="dim", markup=False)

    def _text(self, text: str) -> None:
        self._block += text
        done, self._block = complete_blocks(self._block)
        if done:
            self._stop()
            self._print(done)
        if self._block.strip():
            self._show()

    def _end(self) -> None:
        self._flush()

    def _flush(self) -> None:
        self._stop()
        if self._block.strip():
            self._print(self._block)
        self._block = ""

    def _print(self, text: str) -> None:
        self._console.print(_markdown(text))

    def _show(self) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(
                console=self._console, transient=True, refresh_per_second=REFRESHES, vertical_overflow="crop"
            )
            self._live.start()
        self._live.update(_markdown(self._block))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _styled(text: str, **style: Any) -> str:
    return click.style(text, **style) if is_rich_terminal() and "NO_COLOR" not in os.environ else text


def _markdown(text: str) -> Any:
    from rich.markdown import Markdown

    return Markdown(text, code_theme="ansi_dark", hyperlinks=False)


def complete_blocks(text: str) -> tuple[str, str]:
    """Markdown -> (blocks that no further text changes, the rest): they end at an empty line outside of code."""
    end = at = 0
    in_code = False
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not line.strip() and line.endswith("\n") and not in_code:
            end = at
    return text[:end], text[end:]
