"""edgellm convert"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.options import lora_option, size_text

if TYPE_CHECKING:
    from edgellm.converters import Report


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--format",
    metavar="q2t|q4|q4m|q8|f16|f32|keep",
    help="Weight format; default keep if SOURCE is quantized, else q4m.",
)
@click.option("--name", metavar="TEXT", help="Name of the model; default as in SOURCE.")
@click.option("--license", metavar="TEXT", help="Licence of the weights; default as in SOURCE.")
@click.option("--origin", metavar="TEXT", help="Where the weights come from; default as in SOURCE.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="A llama2.c tokenizer file, if it is not next to SOURCE."
)
@click.option(
    "--names",
    type=click.Path(path_type=Path),
    help="JSON that maps SOURCE's tensor names to Hugging Face's; {} stands for numbers, null skips a tensor.",
)
@lora_option
def command(source: Path, target: Path, **options: Any) -> None:
    """Convert trained weights to TARGET, a .edge file.

    SOURCE is a GGUF file (any shard of a split one), a Hugging Face folder, a llama2.c .bin file, or a weights file
    next to its config.json and tokenizer: safetensors, PyTorch (.bin, .pt, .pth) or NumPy (.npz). --lora merges the
    adapter into the weights.
    """
    from edgellm.converters import convert

    if target.suffix != ".edge":
        raise click.BadParameter(f"{target} must end in .edge", param_hint="TARGET")
    if not target.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {target.parent} does not exist; make it first", param_hint="TARGET")
    print_report(convert(source, target, **options))


def print_report(report: Report) -> None:
    """Print a row for each weight format used, and the total."""
    line = "{:<8}{:>9}{:>12}{:>14}{:>12}{:>16}{:>12}".format
    click.echo(line("format", "tensors", "weights", "bits/weight", "size", "relative error", "max error"))
    for row in sorted(report.rows.values(), key=lambda row: -row.n_bytes):
        click.echo(
            line(
                row.format,
                row.tensors,
                f"{row.weights / 1e6:.2f} M",
                f"{row.bits_per_weight:.2f}",
                size_text(row.n_bytes),
                f"{row.relative_rms:.2e}",
                f"{row.max_error:.2e}",
            )
        )
    total = report.total
    click.echo(
        line(
            "total",
            total.tensors,
            f"{total.weights / 1e6:.2f} M",
            f"{total.bits_per_weight:.2f}",
            size_text(report.n_bytes),
            f"{total.relative_rms:.2e}",
            f"{total.max_error:.2e}",
        )
    )
    for part, count in report.left_out.items():
        click.echo(f"left out: {part}, {count} tensors: edgellm runs the text model")
    click.echo(f"{report.target}: {report.architecture}, {report.recipe}, {report.seconds:.1f} s")
