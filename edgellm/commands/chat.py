"""edgellm chat"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgellm.options import (
    Grouped,
    answer_options,
    check_prompt,
    load_model,
    lora_option,
    model_option,
    prompt_cache,
    prompt_cache_option,
    runtime_options,
    sampling_options,
    show_stats,
    structure_options,
)


@click.command(cls=Grouped)
@click.argument("prompt", required=False)
@model_option
@click.option("--system", metavar="TEXT", help="System prompt, given before the first message.")
@click.option(
    "--session",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Save the conversation in FILE; if FILE exists, continue it.",
)
@click.option("--save-cache", is_flag=True, help="Save the KV cache of a saved conversation too, in FILE.cache.")
@prompt_cache_option
@click.option("--hide-thoughts", is_flag=True, help="Do not show the model's thinking before its answer.")
@sampling_options
@structure_options
@runtime_options
@lora_option
def command(
    prompt: str | None,
    model: str,
    system: str | None,
    session: Path | None,
    save_cache: bool,
    hide_thoughts: bool,
    **options: Any,
) -> None:
    """Chat with a model.

    With PROMPT, or text piped to stdin, answer once and exit; given both, stdin is appended to the prompt. Otherwise
    read messages from the terminal: /help lists the commands, Ctrl-C stops an answer, Ctrl-D or /bye leaves.
    """
    check_prompt(prompt or "")
    interactive = sys.stdin is not None and sys.stdin.isatty()
    question = "\n\n".join(text for text in (prompt, "" if interactive else _piped()) if text)
    if not question and (prompt is not None or not interactive):
        raise click.UsageError("The prompt is empty; give some text.")
    if question and save_cache and session is None:
        raise click.UsageError("--save-cache keeps a cache beside the conversation in --session FILE; give that too.")
    from edgellm.repl import Repl
    from edgellm.screen import screen

    with load_model(model, options) as loaded, prompt_cache(loaded, options["prompt_cache"]):
        shown = screen()
        shown.shows_thoughts = not hide_thoughts
        repl = Repl(loaded, loaded.chat(system), shown, answer_options(options), session, save_cache)
        if question:
            repl.say(question)
        else:
            repl.run()
        repl.leave()
        if options["stats"] and repl.timings:
            show_stats(repl.timings)


def _piped() -> str:
    """The text on stdin, without surrounding white space; "" if there is none."""
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}.") from None
