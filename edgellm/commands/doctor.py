"""edgellm doctor"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from edgellm.options import json_option, size_text

PACKAGES = ("numpy", "numba", "llvmlite", "tokenizers", "click", "jinja2")
MEGABYTE = 1_000_000
SIZES = (16, 64, 256)
"""Megabytes to read: from what CPU caches may hold to what none does."""
PROMPT, N_TOKENS, TOLERANCE = "Once upon a time", 32, 0.05


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Check this machine and its kernels.

    Shows versions, usable kernels, caches and memory speed, and tests whether the kernels compute correctly.
    """
    found = {}
    for section, facts in (("versions", _versions), ("machine", _machine), ("kernels", _kernels), ("caches", _caches),
                           ("memory", _memory), ("self-test", _self_test)):  # fmt: skip
        found[section] = dict(facts())
        if not as_json:
            click.echo(section)
            for key, value in found[section].items():
                click.echo(f"  {key:<24}{value}")
    if as_json:
        click.echo(json.dumps(found))


def _versions() -> Iterator[tuple[str, Any]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import edgellm

    yield "edgellm", edgellm.__version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def _machine() -> Iterator[tuple[str, Any]]:
    import platform
    from pathlib import Path

    from edgellm.footprint import available_memory
    from edgellm.kernels.team import physical_cores

    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "threads", f"{physical_cores()} by default: the cores that this process may use"
    available = available_memory()
    yield "free memory", size_text(available) if available is not None else "not told by this system"
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp")):
        try:
            yield f"temperature {zone.parent.name[12:]}", f"{int(zone.read_text()) / 1000:.0f} C"
        except (OSError, ValueError):
            continue


def _kernels() -> Iterator[tuple[str, Any]]:
    from edgellm import backends

    yield "backend", backends.best()
    if backends.best() != "cpu":
        return
    from edgellm import isa

    machine, features = isa.cpu()
    yield "CPU, as LLVM calls it", isa.host()[1]
    chosen, runnable = isa.detect().__name__.rpartition(".")[2], isa.runnable()
    for name in isa.names():
        kind = isa.get(name)
        if name in runnable:
            yield name, "chosen" if name == chosen else "runs here too"
        elif kind.MACHINE in ("", machine):
            lacking = min((sorted(set(needed) - features) for needed in kind.FEATURES), key=len)
            yield name, f"this CPU lacks {', '.join(lacking)}"


def _caches() -> Iterator[tuple[str, Any]]:
    from edgellm.home import home

    yield "folder", str(home())
    for name in ("models", "downloads", "kernels"):
        files = [path for path in (home() / name).rglob("*") if path.is_file()]
        yield name, f"{len(files)} files, {size_text(sum(path.stat().st_size for path in files))}"


def _memory() -> Iterator[tuple[str, Any]]:
    from edgellm import backends

    if backends.best() != "cpu":
        return
    from edgellm.kernels.bandwidth import Threads, read_rate
    from edgellm.kernels.team import physical_cores

    for n in sorted({1, physical_cores()}):
        threads = Threads(n)
        rates = (f"{read_rate(size * MEGABYTE, threads) / 1e9:.1f} GB/s of {size} MB" for size in SIZES)
        yield f"read by {n} thread{'s' * (n > 1)}", ", ".join(rates)


def _self_test() -> Iterator[tuple[str, Any]]:
    """Compare both backends on the bundled model and the same tokens."""
    import numpy as np

    from edgellm import backends
    from edgellm.api import load
    from edgellm.errors import BackendError

    with load("stories260k", backend="reference") as model:
        answer = model.generate(PROMPT, max_tokens=N_TOKENS, temperature=0)
        ids = answer.prompt_ids + answer.ids
        expected = model.logits(ids)
    yield "reference", repr(answer.text)
    if backends.best() != "cpu":
        return
    with load("stories260k", backend="cpu") as model:
        off = float(np.abs(model.logits(ids) - expected).max() / np.abs(expected).max())
    if not off <= TOLERANCE:
        raise BackendError(
            f"the kernels' logits are {off:.1%} off, expected at most {TOLERANCE:.0%}; run edgellm warmup --clear, and "
            "if that does not help, use --backend reference and report it"
        )
    yield "kernels", f"logits within {off:.2%} of the reference's largest"
