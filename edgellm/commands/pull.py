"""edgellm pull"""

from __future__ import annotations

import click

from edgellm.options import size_text


@click.command()
@click.argument("source", metavar="NAME|SOURCE")
@click.option("--name", metavar="NAME", help="Name for the model; default taken from SOURCE.")
@click.option("--format", metavar="q2t|q4|q4m|q8|f16|f32|keep", help="Weight format, as in edgellm convert.")
def command(source: str, name: str | None, format: str | None) -> None:
    """Download a model, check it and convert it into the cache.

    NAME is a model in edgellm list; SOURCE is hf:OWNER/REPO[/FILE], an https: address or a local path.
    """
    from edgellm import store

    path = store.pull(source, name=name, format=format)
    click.echo(f"{path.stem}: {path}, {size_text(path.stat().st_size)}")
