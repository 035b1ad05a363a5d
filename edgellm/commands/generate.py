"""edgellm generate"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edgellm.options import (
    Grouped,
    answer_options,
    check_prompt,
    json_option,
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

if TYPE_CHECKING:
    from edgellm.answer import Completion
    from edgellm.api import Model


@click.command(cls=Grouped)
@click.argument("prompt")
@model_option
@click.option(
    "--answers", type=click.IntRange(1, 10_000), default=1, show_default=True, metavar="N", help="Number of answers."
)
@prompt_cache_option
@sampling_options
@structure_options
@runtime_options
@lora_option
@json_option
def command(prompt: str, model: str, answers: int, as_json: bool, **options: Any) -> None:
    """Continue PROMPT as raw text, without a chat template.

    --answers makes several continuations in one batch; --json prints one object per continuation.
    """
    check_prompt(prompt)
    with load_model(model, options) as loaded, prompt_cache(loaded, options["prompt_cache"]):
        if answers > 1:
            made = loaded.generate_many(prompt, answers, **answer_options(options))
        else:
            made = [_streamed(loaded, prompt, as_json, options)]
    if n_dropped := max(done.dropped_tokens for done in made):
        which = "oldest {} tokens of the prompt" if options["overflow"] == "shift" else "{} oldest tokens but the first"
        click.echo(f"[ the context is too short: the {which.format(n_dropped)} were left out ]", err=True)
    for i, done in enumerate(made):
        if as_json:
            click.echo(json.dumps(_fields(done)))
        elif answers > 1:
            click.echo(f"{i + 1}:{done.text}")
        if options["stats"]:
            show_stats(done.timings)


def _streamed(model: Model, prompt: str, as_json: bool, options: dict[str, Any]) -> Completion:
    with model.stream(prompt, **answer_options(options)) as stream:
        for piece in stream:
            if not as_json:
                click.echo(piece.text, nl=False)
    if not as_json:
        click.echo()
    return stream.completion


def _fields(done: Completion) -> dict[str, Any]:
    return {
        "text": done.text,
        "ids": done.ids,
        "prompt_ids": done.prompt_ids,
        "finish_reason": done.finish_reason,
        "dropped_tokens": done.dropped_tokens,
        "timings": asdict(done.timings),
    }
