"""Options that several commands share. Imports click alone, so that `--help` is quick."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from edgellm.answer import Timings
    from edgellm.api import Model

F = TypeVar("F", bound=Callable[..., Any])
BIAS = re.compile(r"(\d+)([+-](?:inf|\d+\.?\d*|\.\d+))")

model_option = click.option(
    "-m",
    "--model",
    default="smollm2",
    show_default=True,
    metavar="MODEL",
    help="Name of a model, .edge or .gguf file, or Hugging Face folder.",
)
prompt_cache_option = click.option(
    "--prompt-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Save the evaluated prompt in FILE, and reuse what FILE already has of it.",
)
slots_option = click.option(
    "--slots",
    type=click.IntRange(1),
    metavar="N",
    help="Answers made at once; default 16, or as many as fit into memory.",
)


def _adapters(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> list[tuple[str, float]]:
    """["a", "b:0.5"] -> [("a", 1.0), ("b", 0.5)]."""
    if not texts:
        return []
    from edgellm.store import path_and_scale

    return [path_and_scale(text) for text in texts]


lora_option = click.option(
    "--lora",
    "adapters",
    multiple=True,
    callback=_adapters,
    metavar="PATH[:SCALE]",
    help="Add an adapter (a PEFT folder or a GGUF file), times SCALE; may be repeated.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1), metavar="N", help="Number of threads; default all cores."
)
backend_option = click.option(
    "--backend", metavar="cpu|reference", help="Backend to use; default the best that runs here."
)

kv_option = click.option(
    "--kv",
    type=click.Choice(["f16", "q8"]),
    default="f16",
    show_default=True,
    help="Format of the KV cache; q8 takes half the memory.",
)

runtime_options = _stack(
    click.option(
        "--ctx",
        type=click.IntRange(1),
        metavar="N",
        help="Context length: most tokens of prompt and answer; default the model's limit, at most 8192.",
    ),
    threads_option,
    backend_option,
    kv_option,
)


class Grouped(click.Command):
    """A command whose help shows options under the heading that they belong to."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                groups.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class SamplingOption(click.Option):
    """An option that is a field of SamplingParams, by its name there."""

    heading = "Sampling"


def _sampling(flags: str, name: str, kind: Any, default: Any, text: str) -> Callable[[F], F]:
    whole = isinstance(kind, click.IntRange)
    return click.option(
        *flags.split(), name, cls=SamplingOption, type=kind, default=default, help=text, metavar="N" if whole else "F",
        show_default=default is not None,
    )  # fmt: skip


def _samplers(ctx: click.Context, param: click.Parameter, text: str) -> list[str]:
    return [name.strip() for name in text.split(";") if name.strip()]


def _biases(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[int, float]:
    """["15+2.5", "7-inf"] -> {15: 2.5, 7: -inf}."""
    biases = {}
    for text in texts:
        match = BIAS.fullmatch(text)
        if not match:
            raise click.BadParameter(f"{text!r} is no bias; expected a token's id and a number: 15+2.5 or 7-inf.")
        biases[int(match[1])] = float(match[2])
    return biases


def _breakers(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> list[str]:
    """The word "none" is for no breakers, as llama.cpp has it."""
    return [text for text in texts if text != "none"]


SAMPLERS = "penalties; dry; top_n_sigma; top_k; typ_p; top_p; min_p; xtc; temperature"
POSITIVE, SHARE, COUNT = click.FloatRange(0), click.FloatRange(0, 1), click.IntRange(0)
ABOVE_0 = click.FloatRange(0, min_open=True)

sampling_options = _stack(
    click.option("-n", "--max-tokens", type=click.IntRange(0), metavar="N", help="Generate at most N tokens."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."),
    click.option(
        "--ban",
        "banned_strings",
        multiple=True,
        metavar="TEXT",
        help="Never generate this text; may be repeated.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on after the model has ended its answer."),
    click.option(
        "--overflow",
        type=click.Choice(["error", "shift", "window"]),
        default="error",
        show_default=True,
        help="If the context is too short: error stops; shift leaves out the oldest tokens or turns, and says so; "
        "window also does this while answering, so that an answer may be longer than the context.",
    ),
    click.option(
        "--speculate",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Guess up to N tokens from the text so far and check them at once: the same answer, sooner if it repeats.",
    ),
    click.option("--stats", is_flag=True, help="Show token counts and speed on stderr."),
    _sampling("--temp", "temperature", POSITIVE, 0.8, "Temperature; 0 always takes the likeliest token."),
    _sampling("--top-k", "top_k", COUNT, 40, "Sample from the N likeliest tokens; 0 from all."),
    _sampling("--top-p", "top_p", SHARE, 0.95, "Sample from the likeliest tokens that together have this probability."),
    _sampling("--min-p", "min_p", SHARE, 0.05, "Leave out tokens less likely than this share of the likeliest."),
    _sampling("--seed", "seed", COUNT, None, "Random seed, to get the same answer again."),
    _sampling("--repeat-penalty", "repeat_penalty", ABOVE_0, 1.0, "Make recent tokens less likely; 1 is off."),
    _sampling("--presence-penalty", "presence_penalty", float, 0.0, "Take this off the logits of recent tokens."),
    _sampling("--frequency-penalty", "frequency_penalty", float, 0.0, "Take this off for each time they occurred."),
    _sampling("--repeat-last-n", "repeat_last_n", COUNT, 64, "Tokens that count as recent for the three penalties."),
    _sampling("--typical", "typical_p", SHARE, 1.0, "Locally typical sampling with this probability; 1 is off."),
    _sampling("--top-nsigma", "top_n_sigma", float, -1.0, "Keep logits within F deviations of the top; -1 is off."),
    _sampling("--xtc-probability", "xtc_probability", SHARE, 0.0, "How often to leave out the top choices; 0 is off."),
    _sampling("--xtc-threshold", "xtc_threshold", SHARE, 0.1, "Top choices: tokens this likely, except the last."),
    _sampling("--dynatemp-range", "dynatemp_range", POSITIVE, 0.0, "Vary the temperature by up to this; 0 is off."),
    _sampling("--dynatemp-exp", "dynatemp_exponent", ABOVE_0, 1.0, "How temperature follows the model's uncertainty."),
    _sampling("--dry-multiplier", "dry_multiplier", POSITIVE, 0.0, "Make repeated sequences less likely; 0 is off."),
    _sampling("--dry-base", "dry_base", click.FloatRange(1), 1.75, "Penalty grows by this factor with each token."),
    _sampling("--dry-allowed-length", "dry_allowed_length", COUNT, 2, "Length from which on the penalty grows."),
    _sampling("--dry-penalty-last-n", "dry_penalty_last_n", COUNT, 64, "How many tokens back to look for repeats."),
    click.option("--dry-sequence-breaker", "dry_sequence_breakers", cls=SamplingOption, multiple=True, metavar="TEXT",
                 callback=_breakers, default=["\n", ":", '"', "*"], show_default='\\n : " *',
                 help="A repeat ends at this text; may be repeated."),
    click.option("--mirostat", cls=SamplingOption, type=click.Choice([0, 2]), default=0,
                 show_default=True, help="2 keeps the surprise constant, in place of other samplers; 0 is off."),
    _sampling("--mirostat-ent", "mirostat_tau", POSITIVE, 5.0, "Target surprise of a token, in bits."),
    _sampling("--mirostat-lr", "mirostat_eta", POSITIVE, 0.1, "Learning rate of mirostat."),
    click.option("--logit-bias", cls=SamplingOption, multiple=True, metavar="ID+F", callback=_biases,
                 help="Add F to a token's logit; ID-F subtracts it, ID-inf excludes the token; may be repeated."),
    click.option("--samplers", cls=SamplingOption, metavar="NAMES", callback=_samplers,
                 default=SAMPLERS, show_default=True, help="Samplers to apply, in this order."),
)  # fmt: skip


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
    click.option(
        "--json-schema", callback=_schema, metavar="FILE|JSON", help="Answer with JSON that fits this schema."
    ),
    click.option("--regex", metavar="REGEX", help="Answer with a text that this regex matches as a whole."),
    click.option("--choices", callback=_choices, metavar="A|B|...", help="Answer with one of these texts."),
    click.option("--grammar", callback=_file_text, metavar="FILE", help="Answer with what this GBNF grammar allows."),
)


def answer_options(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of Model.stream, out of a command's parsed options."""
    from edgellm.request import GRAMMARS

    params = click.get_current_context().command.params
    sampling = [str(param.name) for param in params if isinstance(param, SamplingOption)]
    keys = ("max_tokens", "stop", "ignore_eos", "overflow", "speculate", "banned_strings", *sampling, *GRAMMARS)
    return {key: options[key] for key in keys}


def check_prompt(prompt: str) -> None:
    """Raise UsageError for a model where the text should be: other commands, and other programs, have it there."""
    from edgellm import store

    context = click.get_current_context()
    is_default = context.get_parameter_source("model") is ParameterSource.DEFAULT
    if is_default and store.is_model(prompt):
        raise click.UsageError(
            f"{prompt} is a model, not a text; give it with -m: '{context.command_path} -m {prompt}'. "
            f"If it is your text, say which model it is for, with -m too."
        )


def load_model(model: str, options: dict[str, Any], **more: Any) -> Model:
    from edgellm.api import load

    if path := options.get("answer_cache"):
        from edgellm.answer_cache import AnswerCache

        more["answer_cache"] = AnswerCache(path)
    threads, ctx, kv = options["threads"], options.get("ctx"), options.get("kv", "f16")
    more["adapters"] = options.get("adapters", ())
    return load(model, backend=options["backend"], context_length=ctx, n_threads=threads, kv=kv, **more)


def load_with_slots(model: str, options: dict[str, Any], slots: int | None) -> Model:
    """A model with as many slots as are asked for, or as memory holds."""
    from edgellm.errors import OutOfMemoryError
    from edgellm.footprint import available_memory
    from edgellm.scheduler import AT_ONCE

    wanted = slots or AT_ONCE
    made = load_model(model, options, at_once=wanted)
    footprint, available = made.footprint, available_memory()
    share = footprint.share(available, wanted, slots or 1)
    if share == footprint.share(None, wanted):
        return made
    made.close()
    if share is None:
        raise OutOfMemoryError(
            f"{slots or 1} slots of {short_name(model)} do not fit into the {(available or 0) / 1e6:.0f} MB of memory "
            f"that are free, at {footprint.cache / 1e6:.0f} MB each; ask for fewer (--slots), or for a smaller context "
            "(--ctx)"
        )
    return load_model(model, options, at_once=share.slots, cache_bytes=share.cache_bytes)


def short_name(model: str) -> str:
    """What clients call a model: a name without its folder, owner or ending."""
    return Path(model).stem if model.endswith((".edge", ".gguf")) else model.rstrip("/").split("/")[-1]


@contextmanager
def prompt_cache(model: Model, path: Path | None) -> Iterator[None]:
    """Begin with what the file has; write it at the end, unless most of what is there then was in it."""
    if path is None:
        yield
        return
    from edgellm.generate import common

    known = model.load_cache(path).ids if path.exists() else []
    yield
    now = model.prefix_cache.tokens_of()
    if 4 * common(known, now) < 3 * len(now):
        model.save_cache(path)


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


SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def n_bytes_of(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """ "1.5 GB" -> 1500000000, "1.5GiB" -> 1610612736."""
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise click.BadParameter(f"{text!r} is no size; expected a number of bytes, such as 500MB or 4GB.")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
