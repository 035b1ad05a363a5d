"""`edgellm serve` under load, against llama-server on the same GGUF file and the same slots, in turns, in one run.

    python benchmarks/load.py --llama-server PATH                 everything, some ten minutes
    python benchmarks/load.py --tests streams,single --rounds 5   edgellm alone
    python benchmarks/load.py --llama-server PATH --out FILE.json --docs    keep the figures; docs/server.md's table

streams   so many answers at a time (--streams), each followed by the next: a closed loop
arrivals  answers that are asked for at random times (--rate a second), whether or not others are complete: an open loop
single    one answer at a time
share     the same as a share of what `edgellm bench` says of the model alone after prompts as long, in turns
history   time to the first token of a chat's next turn after 2,000 tokens, and of a prompt of 20, each after half a
          second without requests
leave     200 connections of which half hang up midway, edgellm's memory and slots before and after, and its refusals

Every sample is a server of its own. Prompts are random, and other ones each time. Time to the first token is from the
connection on; a wait between tokens is one between events that have text. The client is this process, which
needs some of the CPUs too. `foreign` is how many CPUs others kept busy.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import compare
import machine
import peers
import report

import edgellm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "server.md"
CONTEXT = 2560
"""Tokens of a slot."""
PERSON = 0.5
"""Seconds between an answer and the next request; a person takes longer."""
PR_SET_PDEATHSIG = 1
WORDS = "time year people way day man thing woman life child world school state family student group country hand part"
TEXT = re.compile(rb'"(?:text|content)": ?"[^"]')


# ---- the client


@dataclass
class Told:
    """What came of one request: seconds since it was sent, of each event with text, and the numbers of tokens."""

    status: int = 0
    times: list[float] = field(default_factory=list)
    n_prompt: int = 0
    n_tokens: int = 0
    error: str | None = None
    headers: str = ""

    @property
    def waits(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


async def ask(port: int, path: str, body: dict[str, Any], leave_after: int | None = None) -> Told:
    """Ask for a stream, and read it to its end, or hang up after some events with text."""
    told, started = Told(), time.perf_counter()
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_request(path, {**body, "stream": True, "stream_options": {"include_usage": True}}))
        told.headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        told.status = int(told.headers.split(" ", 2)[1])
        if told.status != 200:
            told.error = (await reader.read(10_000)).decode(errors="replace")
            return told
        async for event in _events(reader):
            if b'"error"' in event:
                told.error = event.decode()
            elif b'"completion_tokens"' in event:
                usage = json.loads(event)["usage"]
                told.n_prompt, told.n_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            elif b'"text":"' in event.replace(b'"text":""', b"") or b'"content":"' in event.replace(
                b'"content":""', b""
            ):
                told.times.append(time.perf_counter() - started)
                if len(told.times) == leave_after:
                    return told
        if not told.n_tokens and not told.error:
            told.error = "the stream ended without usage"
    except (OSError, asyncio.IncompleteReadError) as error:
        told.error = f"{type(error).__name__}: {error}"
    finally:
        if writer:
            writer.close()
    return told


def _request(path: str, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The JSON of events. Servers send whole lines in a chunk, so that sizes of chunks are lines of their own."""
    while line := await reader.readline():
        if line == b"data: [DONE]\n":
            return
        if line.startswith(b"data: "):
            yield line[6:]


async def closed(port: int, n_streams: int, bodies: Sequence[dict[str, Any]], path: str) -> list[Told]:
    """So many at a time: each stream asks again when its answer is complete."""
    left = iter(bodies)

    async def stream() -> list[Told]:
        return [await ask(port, path, body) for body in left]

    return [told for each in await asyncio.gather(*(stream() for _ in range(n_streams))) for told in each]


async def opened(port: int, rate: float, bodies: Sequence[dict[str, Any]], path: str) -> list[Told]:
    """Poisson arrivals: the times between requests are exponential, whatever becomes of them."""
    rng, tasks = random.Random(1), []
    for body in bodies:
        tasks.append(asyncio.ensure_future(ask(port, path, body)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


# ---- servers


@dataclass(frozen=True)
class Server:
    name: str
    variant: str
    command: Callable[[int], list[str]]
    """By its port."""


@contextmanager
def running(server: Server) -> Iterator[tuple[int, int]]:
    """(port, pid) of a server that is ready, and warm: its kernels and prompts of all sizes have run."""
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            server.command(port), stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent
        )
        try:
            _await_ready(process, port, log)
            warming = [completion(words(n), 4) for n in (8, 100, 8)]
            complete(asyncio.run(closed(port, 2, warming, COMPLETIONS)))
            yield port, process.pid
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Even if that is killed, where the system can do so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _await_ready(process: subprocess.Popen[bytes], port: int, log: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            if response.status == 200:
                return
        time.sleep(0.1)
    log.seek(0)
    last = " / ".join(log.read().decode(errors="replace").splitlines()[-3:])
    raise machine.ProcessError(f"{process.args} was not ready within {seconds:.0f} s: {last}")  # type: ignore[str-bytes-safe]


def ours(options: argparse.Namespace, slots: int, *more: str) -> Server:
    command = [
        sys.executable,
        "-m",
        "edgellm",
        "serve",
        str(options.gguf),
        "--slots",
        str(slots),
        "--ctx",
        str(CONTEXT),
    ]
    command += ["-t", str(options.threads), *more]
    return Server("edgellm", "", lambda port: [*command, "--port", str(port)])


def llama(options: argparse.Namespace, path: Path, slots: int, flash: str) -> Server:
    command = [
        str(path), "-m", str(options.gguf), "-np", str(slots), "-c", str(slots * CONTEXT), "-t", str(options.threads),
        "--cont-batching", "-fa", flash, "--no-webui",
    ]  # fmt: skip
    return Server("llama-server", f"fa {flash}", lambda port: [*command, "--port", str(port)])


# ---- requests

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "ignore_eos": True}
RNG = random.Random()


def words(n: int) -> str:
    return " ".join(RNG.choices(WORDS.split(), k=n))


def completion(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, **GREEDY}


def complete(told: Sequence[Told]) -> Sequence[Told]:
    """Raises ProcessError for one that has an error, or no text."""
    if failed := [each.error or "no text" for each in told if each.error or not each.times]:
        raise machine.ProcessError(f"{len(failed)} of {len(told)} requests failed: {failed[0][:300]}")
    return told


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures(told: Sequence[Told], seconds: float) -> dict[str, float]:
    first = [1000 * each.times[0] for each in complete(told)]
    waits = [1000 * wait for each in told for wait in each.waits]
    return {
        "tokens/s": sum(each.n_tokens for each in told) / seconds,
        "ttft p50 ms": percentile(first, 0.5), "ttft p95 ms": percentile(first, 0.95),
        "wait p50 ms": percentile(waits, 0.5), "wait p95 ms": percentile(waits, 0.95),
        "wait p99 ms": percentile(waits, 0.99),
    }  # fmt: skip


# ---- tests


def streams(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    bodies = [completion(words(64), 64) for _ in range(2 * options.streams)]
    started = time.perf_counter()
    told = asyncio.run(closed(port, options.streams, bodies, COMPLETIONS))
    return figures(told, time.perf_counter() - started)


def arrivals(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    bodies = [completion(words(64), 64) for _ in range(int(10 * options.rate))]
    started = time.perf_counter()
    told = asyncio.run(opened(port, options.rate, bodies, COMPLETIONS))
    return figures(told, time.perf_counter() - started)


def single(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    return {"tokens/s": median(rate(told) for told in answers(port))}


def answers(port: int) -> Sequence[Told]:
    """Three, one after the other."""
    chats = [{"messages": [{"role": "user", "content": words(8)}], "max_tokens": 129, **GREEDY} for _ in range(3)]
    return complete(asyncio.run(closed(port, 1, chats, CHATS)))


def rate(told: Told) -> float:
    """Tokens a second, without the first token, as `bench` counts."""
    return (told.n_tokens - 1) / (told.times[-1] - told.times[0])


def share(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    """In turns, a second or so each: the machine's speed changes, and is the same for both."""
    from edgellm.bench import bench

    shares = []
    with edgellm.load(options.gguf, context_length=CONTEXT, n_threads=options.threads) as model:
        for _ in range(5):
            served = answers(port)
            (alone,) = bench(model, 0, 128, served[0].n_prompt, 3)
            shares.append(100 * median(map(rate, served)) / alone["median"])
    return {"%": median(shares)}


def history(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    found: dict[str, list[float]] = {"next turn ms": [], "20 tokens ms": []}
    for _ in range(4):
        chat = [{"role": "user", "content": words(1960)}]
        chat.append({"role": "assistant", "content": said(port, {"messages": chat, "max_tokens": 16, **GREEDY})})
        chat.append({"role": "user", "content": words(8)})
        for name, path, body in (
            ("next turn ms", CHATS, {"messages": chat, "max_tokens": 16, **GREEDY}),
            ("20 tokens ms", COMPLETIONS, completion(words(20), 16)),
        ):
            time.sleep(PERSON)
            (told,) = complete(asyncio.run(closed(port, 1, [body], path)))
            found[name].append(1000 * told.times[0])
    return {name: median(times[1:]) for name, times in found.items()}


def leave(port: int, pid: int, options: argparse.Namespace) -> dict[str, float]:
    """A second after each wave: slots of short texts are given back when the last answer is over. Raises ProcessError
    for an answer that fails because others hang up."""
    before, growth = resident(pid), []
    for _ in range(2):
        told = asyncio.run(leaving(port, [completion(words(64), 64) for _ in range(200)]))
        complete([each for i, each in enumerate(told) if i % 2 == 0])
        until_idle(port)
        time.sleep(1)
        growth.append(resident(pid) / before - 1)
    kept = metric(port, "edgellm_cache_bytes")
    return {"MB": before / 1e6, "growth %": 100 * growth[0], "growth again %": 100 * growth[1], "kept MB": kept / 1e6}


async def leaving(port: int, bodies: Sequence[dict[str, Any]]) -> list[Told]:
    """All at once; every second one hangs up after some tokens."""
    after = [RNG.randrange(1, 40) if i % 2 else None for i in range(len(bodies))]
    asked = (ask(port, COMPLETIONS, body, n) for body, n in zip(bodies, after, strict=True))
    return list(await asyncio.gather(*asked))


def until_idle(port: int, seconds: float = 10) -> None:
    """Raises ProcessError if answers are left that nobody waits for."""
    end = time.monotonic() + seconds
    while metric(port, "edgellm_answers"):
        if time.monotonic() > end:
            raise machine.ProcessError(f"{metric(port, 'edgellm_answers'):.0f} answers are left that nobody waits for")
        time.sleep(0.1)


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        found = re.search(rf"^{name} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def said(port: int, body: dict[str, Any]) -> str:
    raw, kind = json.dumps(body).encode(), {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{CHATS}", raw, kind)) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Test:
    """A test of a server: -> figures by their units."""

    title: str
    run: Callable[[int, int, argparse.Namespace], dict[str, float]]
    slots: int | None = 1
    """None: as many as streams."""
    more: tuple[str, ...] = ()
    """Of the command of edgellm."""
    has_peers: bool = True


TESTS = {
    "streams": Test("answers at a time", streams, slots=None),
    "arrivals": Test("answers a second arrive", arrivals, slots=None),
    "single": Test("one at a time", single),
    "share": Test("one at a time, of `edgellm bench`", share, has_peers=False),
    "history": Test("a chat of 2,000 tokens goes on", history, slots=2),
    "leave": Test("200 at once, half hang up", leave, slots=None, more=("--queue", "200"), has_peers=False),
}


# ---- running


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    test, found = TESTS[name], dict[str, Any]()
    slots = test.slots or options.streams
    contenders = [ours(options, slots, *test.more)]
    if test.has_peers:
        contenders += [llama(options, path, slots, flash) for path in options.llama_server for flash in ("off", "on")]
    for turn in range(options.rounds):
        for server in contenders:
            with running(server) as (port, pid):
                busy, own, started = machine.busy_seconds(), cpu_seconds(pid), time.perf_counter()
                taken = test.run(port, pid, options)
                seconds = time.perf_counter() - started
                foreign = ((machine.busy_seconds() or 0) - (busy or 0) - cpu_seconds(pid) + own) / seconds
            add(found, turn, name, server.name, server.variant, taken, max(0.0, foreign))
    return {"title": test.title, "rounds": options.rounds, "figures": found, "date": date()}


def add(
    found: Any, turn: int, test: str, name: str, variant: str, taken: dict[str, float], foreign: float | None
) -> None:
    compare.keep(found, compare.Contender(name, [], lambda _: {}, variant), taken, foreign)
    shown = "  ".join(f"{value:.4g} {unit}" for unit, value in taken.items())
    others = "" if foreign is None else f"  foreign {foreign:.2f}"
    compare.say(f"{test} {turn + 1}: {name} {variant}".rstrip() + f": {shown}{others}")


def cpu_seconds(pid: int) -> float:
    """Of a server, and of this process, its client."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / machine.TICKS + time.process_time()


def date() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


# ---- what is kept


def result(options: argparse.Namespace, tests: dict[str, Any]) -> dict[str, Any]:
    versions = {"edgellm": f"{edgellm.__version__} ({machine.commit(ROOT / 'edgellm') or 'no git'})"}
    for path in options.llama_server:
        versions["llama-server"] = peers.Llama(path.parent).build()
    facts = {"machine": machine.description(), "versions": versions, "threads": options.threads}
    return {**facts, "model": options.gguf.name, "streams": options.streams, "rate": options.rate, "tests": tests}


def table(found: dict[str, Any]) -> str:
    """In Markdown: medians, of llama-server's with and without flash attention the better; in brackets how many times
    better edgellm's is."""
    lines = ["| | edgellm | llama-server |", "|---|---|---|"]
    for name, test in found["tests"].items():
        n = {"streams": found["streams"], "arrivals": f"{found['rate']:g}"}.get(name)
        title = test["title"] if n is None else f"{n} {test['title']}"
        for unit in test["figures"]["edgellm"][""]:
            if unit != "foreign":
                lines.append(row(f"{title}: {unit}", unit, test["figures"]))
    return "\n".join([*lines, "", *circumstances(found), ""])


def circumstances(found: dict[str, Any]) -> list[str]:
    tests = list(found["tests"].values())
    rounds, dates = sorted({test["rounds"] for test in tests}), sorted({test["date"][:10] for test in tests})
    loads = [load for test in tests for kinds in test["figures"].values() for kept in kinds.values()
             for load in kept.get("foreign", ())]  # fmt: skip
    return [
        f"{report.where(found)}, {found['threads']} threads, {' and '.join(dates)};",
        f"{found['model']}, {CONTEXT} tokens a slot; {report.versions(found)}.",
        f"Rounds: {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))}. "
        f"Other programs kept at most {max(loads):.2f} CPUs busy meanwhile.",
        "To repeat it: `python benchmarks/load.py --llama-server PATH`",
    ]


def row(title: str, unit: str, contenders: dict[str, Any]) -> str:
    ours, cells = contenders["edgellm"][""][unit], []
    for name in ("llama-server",):
        variants = [kept[unit] for kept in contenders.get(name, {}).values()]
        if not variants:
            cells.append("-")
            continue
        best = (max if unit == "tokens/s" else min)(variants, key=median)
        pairs = list(zip(ours, best, strict=False))
        better = median(a / b if unit == "tokens/s" else b / a for a, b in pairs)
        cells.append(f"{report.figure(median(best))} ({better:.2f})")
    return f"| {title} | **{report.figure(median(ours))}** | {' | '.join(cells)} |"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="edgellm serve under load.", epilog=f"tests: {', '.join(TESTS)}")
    parser.add_argument("--tests", default=",".join(TESTS), metavar="NAMES", help="separated by commas; default all")
    parser.add_argument("--llama-server", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="samples of each contender; default 3")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="answers at a time; default 16")
    parser.add_argument("--rate", type=float, default=2.0, metavar="R", help="arrivals a second; default 2")
    parser.add_argument("--gguf", type=Path, metavar="PATH", help="the model; default the one that edgellm fetches")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON; tests that FILE has already stay there")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/server.md")
    options = parser.parse_args(arguments)
    options.tests = list(filter(None, options.tests.split(",")))
    if not options.tests:
        parser.error("--tests names none; expected some")
    for name in options.tests:
        if name not in TESTS:
            parser.error(f"--tests: unknown test {name!r}; known: {', '.join(TESTS)}")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this
    if options.gguf is None:
        options.gguf = compare.fetched(compare.work_folder())
    tests = report.load(options.out)["tests"] if options.out and options.out.is_file() else {}
    for name in options.tests:
        tests[name] = measure(name, options)
        found = result(options, {name: tests[name] for name in TESTS if name in tests})
        if options.out:
            compare.write(options.out, found)
    if options.out and options.docs:
        name = Path(os.path.relpath(options.out.resolve(), ROOT)).as_posix()
        DOCS.write_text(report.with_block(DOCS.read_text("utf-8"), name, table(found)), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
