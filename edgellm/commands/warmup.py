"""edgellm warmup"""

from __future__ import annotations

import click

from edgellm.options import size_text


@click.command()
@click.option("--list", "show", is_flag=True, help="List the compiled kernels instead.")
@click.option("--clear", is_flag=True, help="Delete all compiled kernels instead.")
def command(show: bool, clear: bool) -> None:
    """Compile all kernels for this CPU ahead of time."""
    if show and clear:
        raise click.UsageError("--list and --clear exclude each other.")
    if show:
        _show()
    elif clear:
        _clear()
    else:
        _compile()


def _compile() -> None:
    import time

    from edgellm import backends, isa, quant
    from edgellm.errors import EdgeError

    backends.get("cpu")
    from edgellm.backends.cpu import needed
    from edgellm.cache import KINDS
    from edgellm.kernels import compiler, objects
    from edgellm.shared import make_folder

    make_folder(objects.folder() / objects.key())  # or say at once that it cannot be
    kernels, started = compiler(isa.detect()), time.perf_counter()
    every = list(dict.fromkeys(kernel for kv in KINDS for kernel in needed(quant.names(), kernels.isa.ROWS, kv=kv)))
    n_there = sum(kernels.kept(kernel) for kernel in every)
    kernels.get(every)
    if not all(kernels.kept(kernel) for kernel in every):
        raise EdgeError(
            f"the kernels were compiled, but could not be kept in {objects.folder()}; "
            "set EDGELLM_HOME to a folder that can be written"
        )
    name, cpu = kernels.isa.__name__.rpartition(".")[2], isa.host()[1]
    done = f"{len(every) - n_there} compiled in {time.perf_counter() - started:.1f} s" if n_there < len(every) else ""
    click.echo(f"{len(every)} kernels for {name} on {cpu}: {done or 'all were there'}.")


def _show() -> None:
    from datetime import datetime

    from edgellm.kernels import objects

    for folder in objects.held():
        isas = ", ".join(sorted({name.rpartition("-")[2] for name in folder.names})) or "none"
        used = datetime.fromtimestamp(folder.used).strftime("%Y-%m-%d")
        state = "current" if folder.current else "stale"
        click.echo(
            f"{folder.path.name:<36}{len(folder.names):>4} kernels{size_text(folder.n_bytes):>10}  used {used}  "
            f"{state:<8} {isas}"
        )


def _clear() -> None:
    from edgellm.kernels import objects

    folders = objects.held()
    objects.clear()
    n_bytes = sum(folder.n_bytes for folder in folders)
    click.echo(f"Deleted {size_text(n_bytes)} of compiled kernels.")
