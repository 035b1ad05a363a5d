"""edgellm serve"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.errors import UnsupportedError
from edgellm.options import (
    Grouped,
    load_model,
    lora_option,
    n_bytes_of,
    runtime_options,
    short_name,
    slots_option,
)

if TYPE_CHECKING:
    from edgellm.server.models import Terms


@click.command(cls=Grouped)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 picks a free one.",
)
@slots_option
@click.option(
    "--memory", callback=n_bytes_of, metavar="SIZE",
    help="Memory that all models together may use, such as 4GB; default all that is free.",
)  # fmt: skip
@click.option(
    "--keep-alive", metavar="TIME",
    help="How long an unused model stays loaded, such as 30s or 5m; 0 unloads it at once, -1 only when another model "
    "needs the memory. Default -1 if MODELs are given, else 5m.",
)  # fmt: skip
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    metavar="N",
    help="Answers that may wait in the queue.",
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, metavar="SECONDS",
    help="Time limit for a whole request.",
)  # fmt: skip
@click.option(
    "--grace", type=click.IntRange(0), default=10, show_default=True, metavar="SECONDS",
    help="Time for unfinished answers when the server is stopped.",
)  # fmt: skip
@click.option(
    "--api-key", "keys", multiple=True, metavar="KEY",
    help="Require this key; may be repeated. EDGELLM_API_KEY or a file is safer: other users can see command lines.",
)  # fmt: skip
@click.option(
    "--api-key-file", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
    help="Read the keys from FILE, one per line.",
)  # fmt: skip
@click.option("--without-key", is_flag=True, help="Allow a public address without any key.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Accept requests for this host name, besides localhost and IP addresses; may be repeated.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="Website that may use the server, * for any; may be repeated.",
)
@click.option(
    "--answer-cache", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Keep answers in FILE and reuse them for the same request, if nothing is random (temperature 0, or a seed).",
)  # fmt: skip
@click.option("--page/--no-page", "has_page", default=True, show_default=True, help="Serve a chat page at /.")
@runtime_options
@lora_option
def command(
    models: tuple[str, ...], host: str, port: int, slots: int | None, memory: int | None, keep_alive: str | None,
    queue: int, timeout: float, grace: int, keys: tuple[str, ...], api_key_file: Path | None, without_key: bool,
    hosts: tuple[str, ...], origins: tuple[str, ...], has_page: bool, **options: Any,
) -> None:  # fmt: skip
    """Serve OpenAI's, Anthropic's and Ollama's APIs over HTTP.

    Several clients are answered at once. They use http://127.0.0.1:8080/v1 as their base URL, and the name of a
    MODEL; without MODELs, all pulled models are served. MODELs are loaded at the start while memory allows (of all
    pulled ones, the first), others when they are asked for. Chat page: http://127.0.0.1:8080/. Ctrl-C stops the server.
    """
    import asyncio

    try:
        from edgellm.server import run, security
        from edgellm.server.app import Access
        from edgellm.server.service import Limits, Service
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"the server needs the package {error.name}; run pip install 'edgellm[serve]' and try again"
        ) from error
    access = Access(_keys(keys, api_key_file), hosts, origins)
    security.check_public(host, bool(access.keys), without_key)
    with run.listen(host, port) as socket:
        service = Service(
            _named(models), _terms(bool(models), slots, memory, keep_alive, options), Limits(queue, timeout)
        )
        asyncio.run(service.models.preload())
        address, port = socket.getsockname()[:2]
        base = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        names = ", ".join(service.models.known())
        click.echo(f"{names} at {base}/v1{f'; to chat, open {base}/' if has_page else ''}")
        run.run(service, access, socket, grace, has_page)


def _named(models: tuple[str, ...]) -> dict[str, Path]:
    """The models' files by the names that clients use; empty to serve the whole store, which gets the default model."""
    from edgellm import catalog, store
    from edgellm.errors import ArgumentError

    if not models and not store.installed():
        store.resolve(catalog.DEFAULT)
    named: dict[str, Path] = {}
    for model in models:
        if (name := short_name(model)) in named:
            raise ArgumentError(f"two models are named {name}; expected another name for each: rename a file")
        named[name] = store.resolve(model)
    return named


def _terms(is_named: bool, slots: int | None, memory: int | None, keep_alive: str | None, options: Any) -> Terms:
    from edgellm.footprint import available_memory
    from edgellm.server.models import Terms
    from edgellm.server.schema import seconds_of

    try:
        seconds = seconds_of(keep_alive or ("-1" if is_named else "5m"))
    except ValueError:
        raise click.BadParameter(f"{keep_alive!r} is no time; expected one such as 30s, 5m, 0 or -1.") from None
    return Terms(
        lambda path, **more: load_model(str(path), options, **more),
        slots, memory, available_memory(), seconds, options["ctx"],
    )  # fmt: skip


def _keys(given: tuple[str, ...], file: Path | None) -> list[str]:
    """The keys from the options, the file and the environment."""
    lines = [] if file is None else file.read_text("utf-8").splitlines()
    texts = [*given, *lines, *os.environ.get("EDGELLM_API_KEY", "").split(",")]
    return [text.strip() for text in texts if text.strip()]
