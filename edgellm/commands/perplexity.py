"""edgellm perplexity"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edgellm.commands.tokenize import read_text
from edgellm.options import backend_option, json_option, kv_option, load_model, lora_option, threads_option


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--ctx", "context", type=click.IntRange(4), default=512, show_default=True, metavar="N", help="Tokens per chunk."
)
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="Score only the first N chunks; default all.")
@backend_option
@threads_option
@kv_option
@lora_option
@json_option
def command(model: str, file: Path, context: int, chunks: int | None, as_json: bool, **options: Any) -> None:
    """Measure the perplexity of MODEL on a text.

    Computed as llama-perplexity does: the text in FILE is split into chunks, and the second half
    of each is scored. Lower is better.
    """
    from edgellm.perplexity import perplexity

    text = read_text(file)
    with load_model(model, {**options, "ctx": context}) as loaded:
        for result in perplexity(loaded, text, context, chunks):
            if not as_json:
                click.echo(f"[{result.chunks}] {result.value:.4f}", err=True)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        click.echo(
            f"perplexity {result.value:.4f} +/- {result.error:.4f} "
            f"({result.tokens} tokens in {result.chunks} chunks of {context})"
        )
