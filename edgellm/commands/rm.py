"""edgellm rm"""

from __future__ import annotations

import click


@click.command()
@click.argument("name")
def command(name: str) -> None:
    """Delete a model from the cache."""
    from edgellm import store

    store.remove(name)
    click.echo(f"Deleted {name}.")
