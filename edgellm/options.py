"""Options that several commands share. Imports click alone, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgellm.api import Model, Timings

F = TypeVar("F", bound=Callable[..., Any])

model_option = click.option(
    "-m",
    "--model",
    default="smollm2",
    show_default=True,
    metavar="MODEL",
    help="Name of a model, .edge or .gguf file, or Hugging Face folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1), metavar="N", help="Threads; default all cores."
)
backend_option = click.option(
    "--backend", metavar="reference|cpu|cuda", help="What computes; default the best there is."
)

runtime_options = _stack(
    click.option(
        "--ctx",
        type=click.IntRange(1),
        metavar="N",
        help="Most tokens of prompt and answer; default the model's, at most 8192.",
    ),
    threads_option,
    backend_option,
)

sampling_options = _stack(
    click.option("-n", "--max-tokens", type=click.IntRange(0), metavar="N", help="Most tokens to generate."),
    click.option(
        "--temp",
        type=click.FloatRange(0),
        default=0.8,
        show_default=True,
        metavar="F",
        help="Temperature; 0 always takes the likeliest token.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        default=40,
        show_default=True,
        metavar="N",
        help="Sample from the N likeliest tokens; 0 from all.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1),
        default=0.95,
        show_default=True,
        metavar="F",
        help="Sample from the likeliest tokens that together have this probability.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        default=0.05,
        show_default=True,
        metavar="F",
        help="Leave out tokens less likely than this share of the likeliest.",
    ),
    click.option(
        "--repeat-penalty",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        metavar="F",
        help="Make recent tokens less likely; 1 is off.",
    ),
    click.option("--seed", type=click.IntRange(0), metavar="N", help="For the same answer again."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."),
    click.option("--ignore-eos", is_flag=True, help="Go on when the model ends its answer."),
    click.option(
        "--speculate",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Guess up to N tokens from the text so far, to check at once: the same answer, sooner if it repeats.",
    ),
    click.option("--stats", is_flag=True, help="Show tokens and seconds on stderr."),
)


def _schema(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """JSON as it is, or what a file has."""
    is_json = value is None or value.lstrip().startswith(("{", "true", "false"))
    return value if is_json else _file_text(ctx, param, value)


def _file_text(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path} is not UTF-8 at byte {error.start}.") from None


def _choices(ctx: click.Context, param: click.Parameter, text: str | None) -> list[str] | None:
    return None if text is None else text.split("|")


structure_options = _stack(
    click.option("--json-schema", callback=_schema, metavar="FILE|JSON", help="Answer JSON that this schema allows."),
    click.option("--regex", metavar="REGEX", help="Answer what this regular expression matches as a whole."),
    click.option("--choices", callback=_choices, metavar="A|B|...", help="Answer one of these texts."),
    click.option("--grammar", callback=_file_text, metavar="FILE", help="Answer what this GBNF grammar allows."),
)


def answer_options(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of Model.stream, out of a command's parsed options."""
    names = {"temp": "temperature"}
    structure = ("json_schema", "regex", "choices", "grammar")
    sampling = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    keys = ("max_tokens", *sampling, "stop", "ignore_eos", "speculate", *structure)
    return {names.get(key, key): options[key] for key in keys}


def load_model(model: str, options: dict[str, Any]) -> Model:
    from edgellm.api import load

    return load(model, backend=options["backend"], context_length=options.get("ctx"), n_threads=options["threads"])


def show_stats(timings: Timings) -> None:
    """[ prompt: 12 tokens (4 cached), 80.1 tokens/s | answer: 40 tokens, 31.0 tokens/s ] on stderr; with drafts, how
    many of their tokens were right."""
    drafts = f" | drafts: {timings.accepted_tokens} of {timings.drafted_tokens} tokens accepted"
    click.echo(
        f"[ prompt: {timings.prompt_tokens} tokens ({timings.cached_tokens} cached), "
        f"{timings.prompt_per_second:.1f} tokens/s | answer: {timings.generated_tokens} tokens, "
        f"{timings.generated_per_second:.1f} tokens/s{drafts if timings.drafted_tokens else ''} ]",
        err=True,
    )


def size_text(n_bytes: float) -> str:
    """1536 -> "1.5 KB"."""
    for unit in ("B", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"
