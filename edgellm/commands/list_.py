"""edgellm list"""

from __future__ import annotations

import click

from edgellm.options import size_text


@click.command(name="list")
def command() -> None:
    """List the models that are here, and the known ones that can be fetched."""
    from edgellm import catalog, store

    known = catalog.entries()
    for name in sorted({*known, *(model.name for model in store.installed())}):
        path, entry = store.location(name), known.get(name)
        size = size_text(path.stat().st_size) if path else f"({size_text(entry.size or 0)} to fetch)" if entry else ""
        click.echo(f"{name:<20}{size:>22}  {f'{entry.description} [{entry.license}]' if entry else ''}".rstrip())
