"""edgellm eval"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from edgellm import tasks
from edgellm.commands.tokenize import read_text
from edgellm.options import backend_option, json_option, kv_option, load_model, lora_option, threads_option


@click.command()
@click.argument("task", type=click.Choice(list(tasks.TASKS)))
@click.argument("model")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="EDGELLM_EVAL_DATA",
    metavar="PATH",
    help="Data file of the task, or folder with the data of several; default $EDGELLM_EVAL_DATA.",
)
@click.option("--limit", type=click.IntRange(2), metavar="N", help="Ask only the first N questions.")
@backend_option
@threads_option
@kv_option
@lora_option
@json_option
def command(task: str, model: str, data: Path | None, limit: int | None, as_json: bool, **options: Any) -> None:
    """Score MODEL on a benchmark.

    Questions and scores are those of lm-evaluation-harness, with no examples before a question.
    """
    from edgellm.evaluation import answers, tokenized

    questions = tasks.questions(task, read_text(tasks.data_file(task, data)), limit)
    with load_model(model, options) as loaded:
        asked = [tokenized(loaded, question) for question in questions]
        with click.progressbar(
            answers(loaded, asked), length=len(asked), label=f"Asking {loaded.info.name}", file=sys.stderr
        ) as bar:
            results = tasks.results(tasks.get(task), questions, dict(bar))
        facts = {
            "task": task,
            "model": loaded.info.name,
            "backend": loaded.backend_name,
            "threads": options["threads"],
            "kv": options["kv"],
            "questions": len(questions),
            "cut": sum(any(answer.n_cut for answer in question) for question in asked),
        }
    if as_json:
        click.echo(json.dumps({**facts, "results": {name: result._asdict() for name, result in results.items()}}))
        return
    click.echo(f"{task}, {facts['model']}, {facts['backend']}: {facts['questions']} questions")
    if facts["cut"]:
        click.echo(f"{facts['cut']} of them are longer than the model's context and were cut at the front")
    for name, (value, error) in results.items():
        click.echo(f"{name:<12}{value:>9.4f} +/- {error:.4f}")
