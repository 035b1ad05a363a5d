"""edgellm list"""

from __future__ import annotations

import click

from edgellm.options import size_text


@click.command(name="list")
@click.option("--architectures", "of_architectures", is_flag=True, help="List the supported architectures instead.")
def command(of_architectures: bool) -> None:
    """List the installed models and those you can pull."""
    if of_architectures:
        click.echo("\n".join(architectures_table()))
        return
    from edgellm import catalog, store

    known = catalog.entries()
    for name in sorted({*known, *(model.name for model in store.installed())}):
        path, entry = store.location(name), known.get(name)
        size = size_text(path.stat().st_size) if path else f"({size_text(entry.size or 0)} to fetch)" if entry else ""
        click.echo(f"{name:<20}{size:>22}  {f'{entry.description} [{entry.license}]' if entry else ''}".rstrip())


def architectures_table() -> list[str]:
    """The Markdown table of architectures, as in README.md, and the weight formats: lines."""
    from edgellm import architectures, quant

    rows = [("architecture", "models", "verified with", "read from"), *architectures.described()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return [lines[0], rule, *lines[1:], "", f"Each in {', '.join(quant.names())}."]
