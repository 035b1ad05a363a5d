"""edgellm chat"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from edgellm.options import (
    answer_options,
    load_model,
    model_option,
    runtime_options,
    sampling_options,
    show_stats,
    structure_options,
)

if TYPE_CHECKING:
    from edgellm.chat import Chat


@click.command()
@click.argument("prompt", required=False)
@model_option
@click.option("--system", metavar="TEXT", help="What the model is told before the first message.")
@sampling_options
@structure_options
@runtime_options
def command(prompt: str | None, model: str, system: str | None, **options: Any) -> None:
    """Chat with a model.

    With PROMPT, or text piped into stdin, answer once and exit; with both, stdin is put under the prompt. Otherwise
    read messages from the terminal: Ctrl-C stops an answer, Ctrl-D or /bye leaves.
    """
    interactive = sys.stdin is not None and sys.stdin.isatty()
    question = "\n\n".join(text for text in (prompt, "" if interactive else _piped()) if text)
    if not question and (prompt is not None or not interactive):
        raise click.UsageError("The prompt is empty; give some text.")
    with load_model(model, options) as loaded:
        chat = loaded.chat(system)
        if question:
            _answer(chat, question, options)
        else:
            _converse(chat, loaded.info.name, options)


def _piped() -> str:
    """What stdin has, without the white space around it."""
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}.") from None


def _converse(chat: Chat, name: str, options: dict[str, Any]) -> None:
    from edgellm.errors import ContextOverflowError

    _enable_line_editing()
    click.echo(f"{name}. Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    while True:
        try:
            text = input(">>> ").strip()
            if text == "/bye":
                return
            if text:
                _answer(chat, text, options)
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(stopped; Ctrl-D or /bye leaves)", err=True)
        except ContextOverflowError as error:
            click.echo(f"Error: {error}", err=True)


def _answer(chat: Chat, text: str, options: dict[str, Any]) -> None:
    with chat.stream(text, **answer_options(options)) as stream:
        for piece in stream:
            click.echo(piece.text, nl=False)
    click.echo()
    if options["stats"]:
        show_stats(stream.completion.timings)


def _enable_line_editing() -> None:
    with suppress(ImportError):  # Windows has them without it
        import readline  # noqa: F401 (gives input() its editing keys and history)
