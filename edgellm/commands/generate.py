"""edgellm generate"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from edgellm.options import (
    Grouped,
    answer_options,
    json_option,
    load_model,
    model_option,
    runtime_options,
    sampling_options,
    show_stats,
)


@click.command(cls=Grouped)
@click.argument("prompt")
@model_option
@sampling_options
@runtime_options
@json_option
def command(prompt: str, model: str, as_json: bool, **options: Any) -> None:
    """Continue PROMPT as raw text, without a chat template."""
    with load_model(model, options) as loaded, loaded.stream(prompt, **answer_options(options)) as stream:
        for piece in stream:
            if not as_json:
                click.echo(piece.text, nl=False)
        done = stream.completion
    if as_json:
        click.echo(
            json.dumps(
                {
                    "text": done.text,
                    "ids": done.ids,
                    "prompt_ids": done.prompt_ids,
                    "finish_reason": done.finish_reason,
                    "timings": asdict(done.timings),
                }
            )
        )
    else:
        click.echo()
    if options["stats"]:
        show_stats(done.timings)
