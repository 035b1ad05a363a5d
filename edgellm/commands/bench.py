"""edgellm bench"""

from __future__ import annotations

import json
from typing import Any

import click

from edgellm.options import backend_option, json_option, kv_option, load_model, lora_option, threads_option


@click.command()
@click.argument("model")
@click.option(
    "-p", "n_prompt", type=click.IntRange(0), default=512, show_default=True, metavar="N", help="Tokens of the prompt."
)
@click.option(
    "-n", "n_generate", type=click.IntRange(0), default=128, show_default=True, metavar="N", help="Tokens to generate."
)
@click.option("-r", "repeats", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Measured runs.")
@click.option(
    "--depth",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens in the KV cache before each run.",
)
@threads_option
@backend_option
@kv_option
@lora_option
@json_option
def command(
    model: str, n_prompt: int, n_generate: int, repeats: int, depth: int, as_json: bool, **options: Any
) -> None:
    """Measure the speed of MODEL as llama-bench does.

    Random tokens, no sampling, and one warm-up run first.
    """
    if not n_prompt and not n_generate:
        raise click.UsageError("-p and -n are both 0; expected some tokens of a prompt, or to generate.")
    from edgellm.bench import bench

    with load_model(model, {**options, "ctx": max(n_prompt, n_generate, 1) + depth}) as loaded:
        results = bench(loaded, n_prompt, n_generate, depth, repeats)
        facts = {
            "model": loaded.info.name,
            "backend": loaded.backend_name,
            "threads": options["threads"],
            "depth": depth,
            "kv": options["kv"],
        }
    if as_json:
        click.echo(json.dumps({**facts, "tests": results}))
        return
    click.echo(f"{facts['model']}, {facts['backend']}, depth {depth}: tokens/s over {repeats} runs")
    for test in results:
        click.echo(f"{test['test']:<8}{test['median']:>10.2f}  [{test['min']:.2f}-{test['max']:.2f}]")
