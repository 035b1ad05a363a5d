"""edgellm against other runtimes and against this machine's limits, on the same weights, in turns, in one run.

    python benchmarks/compare.py                                 everything, some ten minutes
    python benchmarks/compare.py --tests decode,start --rounds 5
    python benchmarks/compare.py --out benchmarks/results/NAME.json    keep the figures; report.py makes tables of them

A round takes one sample of every contender, then the next round begins: what slows the machine slows all. Every
sample is a process of its own, edgellm's too; rates are the median of some runs in it after one that warms up, as
llama-bench counts. Flash attention on and off are two contenders, of which the better one stands for llama.cpp, in each
figure anew. Ratios are those of a round, and their median is shown. `foreign` is how many CPUs others kept busy; a
sample with much of it is taken again.

Peers: native llama.cpp, built for this CPU (--llama-bench PATH, several times for several builds, or LLAMA_BENCH, or on
PATH, with its other programs beside it); xllamacpp and OpenVINO GenAI where they are installed (pip install -e
'.[bench]'). What is missing is named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
import peers
import report

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time"
TIMEOUT = 300.0
"""Seconds that a sample may take: far more than any should."""

QUIET, TRIES = 0.2, 3
"""A sample is taken again, so many times at most, when others kept more than so many CPUs busy."""


@dataclass(frozen=True)
class Contender:
    """What is measured: a command, and how to read its figures."""

    name: str
    command: list[str]
    figures: Callable[[machine.Finished], dict[str, float]]
    variant: str = ""
    """Of several with one name, the one with the best median stands for it."""


@dataclass(frozen=True)
class Setup:
    """Where everything is. Files by format; "same" is the one that edgellm's was made of."""

    files: dict[str, Path]
    edge: dict[str, str]
    llamas: tuple[peers.Llama, ...]
    installed: dict[str, str]
    threads: int


@dataclass(frozen=True)
class Test:
    """A row of the table. `targets`, by name or name and unit: how many times better edgellm should be."""

    title: str
    unit: str
    contenders: Callable[[Setup], list[Contender]]
    targets: dict[str, float] = field(default_factory=dict)
    peers: tuple[str, ...] = ("llama.cpp", "llama.cpp Q4_0")
    busy: bool = False
    """A neighbour keeps one core busy."""
    uncounted: int = 0
    """Rounds that warm up: for samples that do not do so themselves."""


# ---- contenders


def rate(read: Callable[[str], float]) -> Callable[[machine.Finished], dict[str, float]]:
    return lambda finished: {"tokens/s": read(finished.stdout)}


def cost(finished: machine.Finished) -> dict[str, float]:
    return {"s": finished.seconds, "MB": finished.peak_mb}


def edgellm(setup: Setup, threads: int, *test: str, format: str = "same") -> Contender:
    """`edgellm bench`, as a user would call it."""
    command = [sys.executable, "-m", "edgellm", "bench", setup.edge[format], "-t", str(threads), "--json", *test]
    return Contender("edgellm", command, rate(peers.edgellm_rate))


def own(name: str, kind: str, model: str | Path, **options: int) -> Contender:
    """A sample by sample.py."""
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(Path(__file__).with_name("sample.py")), kind, str(model), *arguments]
    return Contender(name, command, rate(peers.own_rate))


def llamas(
    setup: Setup, command: Callable[[peers.Llama, Path, str], list[str]], read: Any, *formats: str
) -> list[Contender]:
    """Each build of llama.cpp on each file, with flash attention and without. command(build, file, flash)."""
    return [
        Contender(
            llama_name(format),
            command(llama, setup.files[format], value),
            read,
            variant if len(setup.llamas) == 1 else f"{variant}, {llama.name}",
        )
        for format in formats
        if format in setup.files
        for llama in setup.llamas
        for variant, value in peers.FLASH.items()
    ]


def llama_name(format: str) -> str:
    return "llama.cpp Q4_0" if format == "Q4_0" else "llama.cpp"


def python_peers(setup: Setup, threads: int, **options: int) -> list[Contender]:
    found = []
    if "xllamacpp" in setup.installed and "Q4_0" in setup.files:
        found.append(own("xllamacpp", "xllamacpp", setup.files["Q4_0"], threads=threads, **options))
    if "OpenVINO GenAI" in setup.installed:
        found.append(own("OpenVINO GenAI", "openvino", setup.files["same"], threads=threads, **options))
    return found


def decode(
    threads: int | None = None,
    tokens: int = 128,
    depth: int = 0,
    repeats: int = 3,
    formats: Sequence[str] = ("same", "Q4_0"),
    others: bool = True,
) -> Callable[[Setup], list[Contender]]:
    def contenders(setup: Setup) -> list[Contender]:
        n, first = threads or setup.threads, formats[0]
        ours = "-p", "0", "-n", str(tokens), "--depth", str(depth), "-r", str(repeats)
        theirs = "-p", "0", "-n", str(tokens), "-d", str(depth)

        def command(llama: peers.Llama, file: Path, flash: str) -> list[str]:
            return llama.bench(file, n, flash, repeats, *theirs)

        return [
            edgellm(setup, n, *ours, format=first),
            *llamas(setup, command, rate(peers.bench_rate), *formats),
            own("limit", "read", setup.edge[first], threads=n, depth=depth),
            *(python_peers(setup, n, tokens=tokens) if others else []),
        ]

    return contenders


def prefill(setup: Setup) -> list[Contender]:
    def command(llama: peers.Llama, file: Path, flash: str) -> list[str]:
        return llama.bench(file, setup.threads, flash, 3, "-p", "512", "-n", "0")

    return [
        edgellm(setup, setup.threads, "-p", "512", "-n", "0", "-r", "3"),
        *llamas(setup, command, rate(peers.bench_rate), "same", "Q4_0"),
        own("limit", "dot", setup.edge["same"], threads=setup.threads),
        *python_peers(setup, setup.threads, prompt=512),
    ]


def batch(setup: Setup) -> list[Contender]:
    sequences, prompt, tokens = 16, 64, 64

    def command(llama: peers.Llama, file: Path, flash: str) -> list[str]:
        return llama.batched(file, setup.threads, flash, sequences, prompt, tokens)

    sizes = {"prompt": prompt, "tokens": tokens, "sequences": sequences, "threads": setup.threads, "repeats": 1}
    return [
        own("edgellm", "batch", setup.edge["same"], **sizes),
        *llamas(setup, command, rate(peers.batched_rate), "same", "Q4_0"),
    ]


def busy(setup: Setup) -> list[Contender]:
    """llama.cpp with all threads, and with one less, which a busy neighbour can make the better choice."""
    found = [edgellm(setup, setup.threads, "-p", "0", "-n", "64", "-r", "2")]
    for n in sorted({setup.threads, max(1, setup.threads - 1)}):
        for each in decode(n, tokens=64, repeats=2, others=False)(setup):
            if each.name.startswith("llama.cpp"):
                found.append(Contender(each.name, each.command, each.figures, f"{each.variant}, -t {n}"))
    return found


def start(setup: Setup) -> list[Contender]:
    """One token in a fresh process: to its end, and its peak memory."""

    def command(llama: peers.Llama, file: Path, flash: str) -> list[str]:
        return llama.first_token(file, setup.threads, flash, 2048, PROMPT)

    ours = [
        sys.executable, "-m", "edgellm", "generate", PROMPT, "-m", setup.edge["same"], "-n", "1", "--temp", "0",
        "--ctx", "2048", "-t", str(setup.threads),
    ]  # fmt: skip
    return [Contender("edgellm", ours, cost), *llamas(setup, command, cost, "same", "Q4_0")]


PYTHON_PEERS = "xllamacpp", "OpenVINO GenAI"
LLAMA = "llama.cpp", "llama.cpp Q4_0"


def of_llama(same: float, q4_0: float, **others: float) -> dict[str, float]:
    return dict(zip(LLAMA, (same, q4_0), strict=True)) | others


TESTS = {
    "decode": Test("decode, all cores", "tokens/s", decode(), of_llama(4, 3, limit=0.78), LLAMA + PYTHON_PEERS),
    "decode1": Test("decode, 1 thread", "tokens/s", decode(threads=1), of_llama(2.8, 2.8), LLAMA + PYTHON_PEERS),
    "depth": Test(
        "decode after 4096 tokens", "tokens/s", decode(tokens=32, depth=4096, repeats=2, others=False), of_llama(3, 3)
    ),
    "batch": Test("decode, 16 sequences", "tokens/s", batch, of_llama(4, 4)),
    "busy": Test("decode, one core busy with another program", "tokens/s", busy, of_llama(3, 3), busy=True),
    "q8": Test(
        "decode, Q8_0 file", "tokens/s", decode(formats=("Q8_0",), others=False), {"limit": 0.75}, ("llama.cpp",)
    ),
    "prefill": Test(
        "prefill, 512 tokens", "tokens/s", prefill, of_llama(7, 3) | {"OpenVINO GenAI": 1.5}, LLAMA + PYTHON_PEERS
    ),
    "start": Test("start to one token", "s, MB", start, {"llama.cpp s": 1, "llama.cpp MB": 1 / 1.2}, uncounted=1),
}
"""Targets are ambitions, which not every machine leaves room for: no decode is faster than its weights are read."""


# ---- setting up


class SetupError(Exception):
    """Something that was asked for is not there."""


def prepare(options: argparse.Namespace) -> tuple[Setup, dict[str, str]]:
    """Find the peers, make the files, compile the kernels: -> the setup, and why what is missing is missing."""
    missing: dict[str, str] = {}
    try:
        found = [peers.find_llama(path) for path in options.llama_bench or [None]]
    except FileNotFoundError as error:
        raise SetupError(f"--llama-bench or LLAMA_BENCH: {error}") from None
    llamas = tuple(llama for llama in found if llama)
    if not llamas:
        missing["llama.cpp"] = missing["llama.cpp Q4_0"] = "no llama-bench; give --llama-bench PATH"
    packages = {name: machine.package_version(package) for name, package in peers.PACKAGES.items()}
    installed = {name: version for name, version in packages.items() if version}
    missing |= {
        name: f"not installed; pip install {package}"
        for name, package in peers.PACKAGES.items()
        if name not in installed
    }
    files = weights(options, llamas, missing)
    edge: dict[str, str] = {format: str(files[format]) for format in ("same", "Q8_0") if format in files}
    for path in edge.values():
        say(f"edgellm: converting {Path(path).name} and compiling kernels, where that is not done yet")
        machine.run([sys.executable, "-m", "edgellm", "bench", path, "-p", "40", "-n", "2", "-r", "1"], 600)
    return Setup(files, edge, llamas, installed, options.threads), missing


def weights(options: argparse.Namespace, llamas: tuple[peers.Llama, ...], missing: dict[str, str]) -> dict[str, Path]:
    """The GGUF files by format, made of the given one where they are not there yet."""
    folder = options.work
    folder.mkdir(parents=True, exist_ok=True)
    files = {"same": options.gguf or fetched(folder)}
    for format in ("Q4_0", "Q8_0"):
        path = folder / f"{files['same'].stem}-{format}.gguf"
        if not path.is_file():
            whole = [llama for llama in llamas if not llama.lacks("llama-quantize")]
            if not whole:
                why = llamas[0].lacks("llama-quantize") if llamas else "no llama.cpp"
                missing[f"{format} file"] = f"{why}, which makes it; put one at {path}"
                continue
            say(f"llama-quantize: making {path.name}")
            whole[0].quantize(files["same"], path, format)
        files[format] = path
    if "Q4_0" not in files:
        missing.setdefault("llama.cpp Q4_0", missing["Q4_0 file"])
    return files


def fetched(folder: Path) -> Path:
    """The checkpoint that the default model is converted from."""
    from edgellm import catalog
    from edgellm.download import fetch

    entry = catalog.get(catalog.DEFAULT)
    path = folder / Path(entry.file[0]).name
    if not path.is_file():
        say(f"fetching {path.name}, {(entry.size or 0) / 1e6:.0f} MB")
        return fetch(entry.source, folder, file=entry.file, sha256=entry.sha256, size=entry.size)
    return path


def work_folder() -> Path:
    from edgellm.home import home

    return home() / "benchmarks"


# ---- running


def measure(name: str, setup: Setup, rounds: int, missing: dict[str, str]) -> dict[str, Any]:
    """Rounds of one test: -> what report.py reads. A peer that fails is left out from then on, and named."""
    test = TESTS[name]
    contenders = test.contenders(setup)
    found: dict[str, Any] = {}
    lacking = {peer: missing[peer] for peer in test.peers if peer in missing}
    for turn in range(-test.uncounted, rounds):
        for each in list(contenders):
            where = f"{name} {turn + 1}/{rounds}: {each.name} {each.variant}".rstrip()
            try:
                figures, foreign = sample(each, test.busy)
            except (machine.ProcessError, peers.OutputError) as error:
                if each.name in ("edgellm", "limit"):
                    raise
                say(f"{where}: FAILED: {error}")
                lacking[f"{each.name} {each.variant}".rstrip()] = str(error)
                contenders.remove(each)
                found.get(each.name, {}).pop(each.variant, None)
                continue
            shown = "  ".join(f"{value:.4g} {unit}" for unit, value in figures.items())
            say(f"{where}: {shown}" + ("" if foreign is None else f"  foreign {foreign:.2f}"))
            if turn >= 0:
                keep(found, each, figures, foreign)
    return {
        "title": test.title, "targets": test.targets, "rounds": rounds, "missing": lacking,
        "figures": {name: variants for name, variants in found.items() if variants},
    }  # fmt: skip


def sample(contender: Contender, busy: bool) -> tuple[dict[str, float], float | None]:
    """The figures and the foreign load of one process; of another one if others were at work, the quietest of few."""
    finished: list[machine.Finished] = []
    while len(finished) < TRIES and all((each.foreign or 0.0) > QUIET for each in finished):
        with machine.Neighbour() if busy else nullcontext() as neighbour:
            finished.append(machine.run(contender.command, TIMEOUT, neighbour))
    quietest = min(finished, key=lambda each: each.foreign or 0.0)
    return contender.figures(quietest), quietest.foreign


def keep(found: dict[str, Any], each: Contender, figures: dict[str, float], foreign: float | None) -> None:
    """Add a sample: found[name][variant][unit] and [...]["foreign"] are lists, one value for each round."""
    kept = found.setdefault(each.name, {}).setdefault(each.variant, {})
    for unit, value in figures.items():
        kept.setdefault(unit, []).append(float(f"{value:.5g}"))
    if foreign is not None:
        kept.setdefault("foreign", []).append(round(foreign, 3))


def versions(setup: Setup) -> dict[str, str]:
    """Of everything that takes part."""
    import edgellm

    found = {"edgellm": f"{edgellm.__version__} ({machine.commit(ROOT / 'edgellm') or 'no git'})"}
    for package in ("numpy", "numba", "llvmlite"):
        found[package] = machine.package_version(package) or "missing"
    if setup.llamas:
        found["llama.cpp"] = ", ".join(dict.fromkeys(llama.build() for llama in setup.llamas))
    return found | setup.installed


def result(setup: Setup, tests: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": machine.description(),
        "versions": versions(setup),
        "threads": setup.threads,
        "model": setup.files["same"].name,
        "tests": tests,
    }


def merged(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The new tests beside those that the file has; raises SetupError if the file is of something else."""
    if not path.is_file():
        return new
    try:
        old = report.load(path)
    except report.ReportError as error:
        raise SetupError(f"--out: {error}; remove that file or give another") from None
    for key in ("machine", "versions", "threads", "model"):
        if old[key] != new[key]:
            raise SetupError(
                f"--out: {path} has figures of another {key}: {old[key]}, and now it is {new[key]}; "
                f"remove that file or give another"
            )
    tests = {**old["tests"], **new["tests"]}
    return {**new, "tests": {name: tests[name] for name in TESTS if name in tests}}


def write(path: Path, found: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(report.dump(found), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    from edgellm.kernels.team import physical_cores

    parser = argparse.ArgumentParser(
        description="edgellm against other runtimes and this machine's limits.", epilog=f"tests: {', '.join(TESTS)}"
    )
    parser.add_argument("--tests", default=",".join(TESTS), metavar="NAMES", help="separated by commas; default all")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="samples of each contender; default 3")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N", help="default: all cores")
    parser.add_argument(
        "--llama-bench", metavar="PATH", action="append", help="llama.cpp's llama-bench, its other programs beside it; "
        "of several builds, the best one for each figure counts",
    )  # fmt: skip
    parser.add_argument("--gguf", type=Path, metavar="PATH", help="the model; default the one that edgellm fetches")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where files are made; default edgellm's cache")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON; tests that FILE has already stay there")
    options = parser.parse_args(arguments)
    options.tests, options.work = options.tests.split(","), options.work or work_folder()
    for name in options.tests:
        if name not in TESTS:
            parser.error(f"--tests: unknown test {name!r}; known: {', '.join(TESTS)}")
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected 1 or more")
    if options.gguf is not None and not options.gguf.is_file():
        parser.error(f"--gguf: there is no file {options.gguf}")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.absolute().parent}")
    if not hasattr(os, "wait4"):
        parser.error("this system does not tell what a process took; Linux and macOS do")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    try:
        setup, missing = prepare(options)
        for peer, why in missing.items():
            say(f"missing: {peer}: {why}")
        if options.out is not None:
            merged(options.out, result(setup, {}))  # raises now rather than after ten minutes
        tests = {}
        for name in options.tests:
            if name == "q8" and "Q8_0" not in setup.files:
                say(f"q8 is left out: {missing['Q8_0 file']}")
                continue
            tests[name] = measure(name, setup, options.rounds, missing)
            tests[name]["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            if options.out is not None:
                write(options.out, merged(options.out, result(setup, {name: tests[name]})))
        print(report.text(result(setup, tests)))
    except (SetupError, machine.ProcessError, peers.OutputError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
