"""edgellm fit"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.options import json_option, lora_option, runtime_options, size_text

if TYPE_CHECKING:
    from edgellm.adapter import Adapter
    from edgellm.loading import LoadedFile

LARGEST = 256_000_000
"""Most bytes to read when measuring: no CPU cache holds as many, so reading more gives the same rate."""


@click.command()
@click.argument("model")
@runtime_options
@lora_option
@json_option
def command(
    model: str,
    ctx: int | None,
    threads: int | None,
    backend: str | None,
    kv: str,
    adapters: list[tuple[str, float]],
    as_json: bool,
) -> None:
    """Tell whether MODEL fits in memory, and how fast it can be.

    The speed is an upper limit for decoding. Like loading the model, exits with 11 if a full context does not fit.
    """
    from edgellm import backends, store
    from edgellm.api import allowed_context
    from edgellm.footprint import available_memory
    from edgellm.loading import open_model

    loaded = open_model(store.resolve(model))
    name, context = backend or backends.best(), allowed_context(ctx, loaded.config.context_length)
    available, adapter = available_memory(), _adapter(loaded, adapters)
    made = backends.get(name)(loaded.architecture, loaded.config, loaded.file.tensors, context, threads, kv)
    if adapter:
        made.adapt(adapter)
    footprint = made.footprint
    made.close()
    facts: dict[str, Any] = {
        "model": loaded.file.info.name, "backend": name, "context": context, "kv": kv, **asdict(footprint),
        "total": footprint.total, "available": available,
    }  # fmt: skip
    if name == "cpu":
        facts |= _decoding(loaded, adapter, footprint.cache, threads)
    click.echo(json.dumps(facts) if as_json else "\n".join(_lines(facts)))
    footprint.check(available, context)


def _adapter(loaded: LoadedFile, adapters: list[tuple[str, float]]) -> Adapter | None:
    """The adapters combined into one; None without any."""
    from edgellm.adapter import Adapter, combined

    read = import_module("edgellm.converters").read_adapter
    made = [Adapter(path, "", read(Path(path), loaded.architecture, loaded.config, scale)) for path, scale in adapters]
    return combined(made) if made else None


def _decoding(loaded: LoadedFile, adapter: Adapter | None, cache: int, threads: int | None) -> dict[str, float]:
    """Bytes read per token, how fast this machine reads them, and the decoding speed that this allows."""
    from edgellm.kernels.bandwidth import Threads, read_rate
    from edgellm.kernels.team import physical_cores
    from edgellm.plan import adapted, record

    plan = record(loaded.architecture, loaded.config, loaded.file.tensors)
    n_bytes = (adapted(plan, adapter.pairs) if adapter else plan).bytes_read()
    rate = read_rate(min(n_bytes, LARGEST), Threads(threads or physical_cores()))
    return {
        "bytes_per_token": n_bytes, "bytes_per_second": rate, "most_tokens_per_second": rate / n_bytes,
        "most_tokens_per_second_at_full_context": rate / (n_bytes + cache),
    }  # fmt: skip


def _lines(facts: dict[str, Any]) -> list[str]:
    weights = facts["weights"] <= (facts["available"] or facts["weights"])
    notes = {
        "weights": "mapped from the file" if facts["backend"] == "cpu" else "dequantized",
        **({"adapters": "of --lora"} if facts["adapters"] else {}),
        "cache": f"what {facts['context']} tokens leave, taken as they come",
        "arena": "what ops leave for each other",
        "total": "" if weights else "more than is free: weights will be read again from disk, slowly",
    }
    lines = [f"{facts['model']}, backend {facts['backend']}, a context of {facts['context']} tokens"]
    lines += [f"{part:<12}{size_text(facts[part]):>12}  {note}".rstrip() for part, note in notes.items()]
    if facts["available"] is not None:
        lines.append(f"{'free':<12}{size_text(facts['available']):>12}")
    if "most_tokens_per_second" in facts:
        fast, slow = facts["most_tokens_per_second"], facts["most_tokens_per_second_at_full_context"]
        read, rate = size_text(facts["bytes_per_token"]), size_text(facts["bytes_per_second"])
        lines += [
            f"{'a token':<12}{read:>12}  are read, of {rate} that this machine reads in a second",
            f"{'decoding':<12}{fast:>8.0f} t/s  at most, with a full context {slow:.0f}; two thirds of it is usual",
        ]
    return lines
