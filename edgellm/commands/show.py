"""edgellm show"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edgellm.options import json_option, size_text


@click.command()
@click.argument("model")
@click.option("--tensors", "with_tensors", is_flag=True, help="Also list the tensors.")
@click.option("--plan", "with_plan", is_flag=True, help="Show the operations of one step instead.")
@json_option
def command(model: str, with_tensors: bool, with_plan: bool, as_json: bool) -> None:
    """Show what is in MODEL, or in the adapter at that path.

    Architecture, sizes, formats, licence.
    """
    if _is_adapter(Path(model)):
        _show_adapter(Path(model), as_json)
        return
    from edgellm import store
    from edgellm.loading import open_model

    loaded = open_model(store.resolve(model))
    file = loaded.file
    if with_plan:
        from edgellm.plan import record
        from edgellm.plan_text import describe

        click.echo("\n".join(describe(record(loaded.architecture, loaded.config, file.tensors))))
        return
    tensors = [
        {"name": t.name, "shape": list(t.shape), "format": t.format, "bytes": t.data.nbytes}
        for t in file.tensors.values()
    ]
    facts: dict[str, Any] = {
        **asdict(file.info),
        "path": str(file.path),
        "bytes": file.n_bytes,
        "weights": sum(_weights(tensor) for tensor in tensors),
        "fingerprint": file.fingerprint,
    }
    file.close()
    if as_json:
        click.echo(json.dumps({**facts, "tensors": tensors} if with_tensors else facts, ensure_ascii=False))
        return
    _print(facts, tensors, with_tensors)


def _is_adapter(path: Path) -> bool:
    if not path.is_dir() and path.suffix.lower() != ".gguf":
        return False
    from edgellm.converters import is_adapter

    return is_adapter(path)


def _show_adapter(path: Path, as_json: bool) -> None:
    from edgellm.converters import open_adapter

    facts = {**open_adapter(path).facts(), "path": str(path)}
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for key, value in facts.items():
        if value is not None:
            click.echo(f"{key:<16}{', '.join(map(str, value)) if isinstance(value, list) else value}")


def _print(facts: dict[str, Any], tensors: list[dict[str, Any]], with_tensors: bool) -> None:
    config, template = facts.pop("config"), facts.pop("chat_template")
    bits = 8 * sum(tensor["bytes"] for tensor in tensors) / facts["weights"]
    facts |= {
        "bytes": size_text(facts["bytes"]),
        "weights": f"{facts['weights'] / 1e6:.1f} M, {bits:.2f} bits each",
        "chat_template": f"{len(template)} characters" if template else "none",
        **config,
    }
    for key, value in facts.items():
        click.echo(f"{key:<16}{value}")
    if with_tensors:
        click.echo()
        for tensor in tensors:
            shape = " x ".join(map(str, tensor["shape"]))
            click.echo(f"{tensor['name']:<24}{shape:>16}  {tensor['format']:<4}{size_text(tensor['bytes']):>10}")


def _weights(tensor: dict[str, Any]) -> int:
    count = 1
    for size in tensor["shape"]:
        count *= size
    return count
