"""edgellm serve"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.errors import UnsupportedError
from edgellm.options import Grouped, load_with_slots, lora_option, runtime_options, short_name, slots_option

if TYPE_CHECKING:
    from edgellm.api import Model


@click.command(cls=Grouped)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N", help="0: any.")
@slots_option
@click.option(
    "--queue", type=click.IntRange(0), default=64, show_default=True, metavar="N", help="Answers that may wait."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, metavar="SECONDS",
    help="For all of a request.",
)  # fmt: skip
@click.option(
    "--grace", type=click.IntRange(0), default=10, show_default=True, metavar="SECONDS",
    help="For answers under way when the server is to end.",
)  # fmt: skip
@click.option(
    "--api-key", "keys", multiple=True, metavar="KEY",
    help="Ask clients for this key; may be repeated. Better in EDGELLM_API_KEY or a file: others see a command line.",
)  # fmt: skip
@click.option(
    "--api-key-file", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
    help="Keys, one a line.",
)  # fmt: skip
@click.option("--without-key", is_flag=True, help="Listen at a public address though no key is asked for.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name of this server, beside localhost and addresses.",
)
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="URL", help="A site whose pages may use the server; * for all."
)
@click.option(
    "--answer-cache", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Answer from FILE what was asked before, where nothing is left to chance (temperature 0, or a seed).",
)  # fmt: skip
@click.option("--page/--no-page", "has_page", default=True, show_default=True, help="Whether / is a page to chat on.")
@runtime_options
@lora_option
def command(
    models: tuple[str, ...], host: str, port: int, slots: int | None, queue: int, timeout: float, grace: int,
    keys: tuple[str, ...], api_key_file: Path | None, without_key: bool, hosts: tuple[str, ...],
    origins: tuple[str, ...], has_page: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer requests of OpenAI's API over HTTP, of several clients at once.

    Clients use http://127.0.0.1:8080/v1 as their base URL, and a MODEL's name; the default one is served if none is
    given. A browser finds a page to chat on at http://127.0.0.1:8080/. Ctrl-C ends the server.
    """
    from edgellm import catalog

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
        loaded = _loaded(models or (catalog.DEFAULT,), options, slots)
        address, port = socket.getsockname()[:2]
        base = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        click.echo(f"{', '.join(loaded)} at {base}/v1{f'; to chat, open {base}/' if has_page else ''}")
        run.run(Service(loaded, Limits(queue, timeout)), access, socket, grace, has_page)


def _loaded(names: tuple[str, ...], options: dict[str, Any], slots: int | None) -> dict[str, Model]:
    """Models by the names that clients know them by, with as many slots as were asked for or memory holds."""
    from edgellm.errors import ArgumentError

    loaded: dict[str, Model] = {}
    promised = 0
    for model in names:
        if (name := short_name(model)) in loaded:
            raise ArgumentError(f"two models are named {name}; expected another name for each: rename a file")
        loaded[name] = load_with_slots(model, options, slots, promised)
        promised += loaded[name].footprint.cache * loaded[name].at_once + loaded[name].footprint.arena
    return loaded


def _keys(given: tuple[str, ...], file: Path | None) -> list[str]:
    """Those of options, file and environment."""
    lines = [] if file is None else file.read_text("utf-8").splitlines()
    texts = [*given, *lines, *os.environ.get("EDGELLM_API_KEY", "").split(",")]
    return [text.strip() for text in texts if text.strip()]
