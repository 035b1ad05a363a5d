"""edgellm export"""

from __future__ import annotations

from pathlib import Path

import click

from edgellm.commands.convert import print_report


@click.command()
@click.argument("model")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def command(model: str, target: Path) -> None:
    """Write MODEL to TARGET, a .gguf file for llama.cpp.

    Every value is kept: q8 becomes Q8_0, q4 Q4_0, q4m Q4_1, q2t TQ2_0, f16 F16, f32 F32.
    """
    from edgellm import store
    from edgellm.converters import export

    if target.suffix != ".gguf":
        raise click.BadParameter(f"{target} must end in .gguf", param_hint="TARGET")
    if not target.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {target.parent} does not exist; make it first", param_hint="TARGET")
    print_report(export(store.resolve(model), target))
