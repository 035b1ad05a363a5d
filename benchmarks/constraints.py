"""What answers after a schema cost, and whether they are valid.

    python benchmarks/constraints.py                 time of the first mask, and per token beside the decoding
    python benchmarks/constraints.py --answers 1000  random answers: how many end, and whether those are valid
    ... --out FILE.json                              keep the figures; an interrupted run goes on after the last schema
    python benchmarks/constraints.py --write docs/json-schema.md --out FILE.json    the tables there, of what was kept

Needs the extras structured and dev.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import jsonschema
import machine
import numpy as np
import report

import edgellm
from edgellm.arrays import F32
from edgellm.shared import replacing
from edgellm.structured.constraint import Constraint, Vocabulary, grammar_for

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("schemas.json").read_text(encoding="utf-8"))
TEMPERATURE, MAX_TOKENS = 1.5, 512
ALL_TOKENS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
SAMPLING: dict[str, dict[str, Any]] = {"default samplers": {}, "no top-k, top-p, min-p": ALL_TOKENS}
Figures = dict[str, Any]


class Timed(Constraint):
    """A constraint that notes the seconds of each token."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: list[float] = []

    def mask(self, logits: F32) -> F32:
        begin = time.perf_counter()
        masked = super().mask(logits)
        self.seconds.append(time.perf_counter() - begin)
        return masked

    def accept(self, id: int) -> None:
        begin = time.perf_counter()
        super().accept(id)
        self.seconds[-1] += time.perf_counter() - begin


def costs(model: edgellm.Model) -> Figures:
    """Milliseconds once a model, a token and a schema; microseconds of each token's mask."""
    begin = time.perf_counter()
    vocabulary = Vocabulary(model.tokenizer)
    found: Figures = {"vocabulary ms": round(1e3 * (time.perf_counter() - begin), 1)}
    model.generate("Once", max_tokens=8)
    free = model.generate("Once upon a time", max_tokens=200, temperature=0, ignore_eos=True)
    decode = free.timings.generate_seconds / (free.timings.generated_tokens - 1)
    found["decoding ms"] = round(1e3 * decode, 3)
    found["schemas"] = {name: cost(model, vocabulary, name, decode) for name in SCHEMAS}
    return found


def cost(model: edgellm.Model, vocabulary: Vocabulary, name: str, decode: float) -> Figures:
    grammar = grammar_for(json_schema=SCHEMAS[name])
    assert grammar
    begin = time.perf_counter()
    grammar_for(json_schema=SCHEMAS[name])
    constraint = Timed(vocabulary, grammar)
    constraint.mask(np.zeros(vocabulary.n_tokens, np.float32))
    first = time.perf_counter() - begin
    ids = model.generate(f"A {name} in JSON: ", json_schema=SCHEMAS[name], max_tokens=MAX_TOKENS, seed=1).ids
    constraint = Timed(vocabulary, grammar)
    logits = np.random.default_rng(0).standard_normal(vocabulary.n_tokens, np.float32)
    for id in ids:
        constraint.mask(logits)
        constraint.accept(id)
    us = [1e6 * seconds for seconds in constraint.seconds]
    return {
        "first mask ms": round(1e3 * first, 2),
        "tokens": len(us),
        "median us": round(median(us)),
        "mean us": round(mean(us)),
        "most us": round(max(us)),
        "of decoding": round(mean(us) / 1e6 / decode, 4),
    }


def answers(model: edgellm.Model, n: int, found: Figures, sampling: dict[str, Any], keep: Callable[[], None]) -> None:
    """Of each schema its share of `n` answers, unless `found` has it."""
    shares = {name: len(range(i, n, len(SCHEMAS))) for i, name in enumerate(SCHEMAS)}
    for name, share in shares.items():
        if not share or found.get(name, {}).get("answers") == share:
            continue
        found[name] = tried(model, name, share, sampling)
        print(f"{name}: {found[name]}", flush=True)
        keep()


def tried(model: edgellm.Model, name: str, n: int, sampling: dict[str, Any]) -> Figures:
    found = {"answers": n, "ended": 0, "wrong": 0, "tokens": 0}
    made = model.generate_many(
        f"A {name} in JSON: ", n, json_schema=SCHEMAS[name], max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=0,
        **sampling,
    )  # fmt: skip
    for seed, answer in enumerate(made):
        found["tokens"] += len(answer.ids)
        if answer.finish_reason == "length":
            print(f"not ended, {name}, seed {seed}: {answer.text[:60]!r}...", flush=True)
            continue
        found["ended"] += 1
        if error := problem(answer.text, SCHEMAS[name]):
            found["wrong"] += 1
            print(f"WRONG, {name}, seed {seed}: {answer.text!r}: {error}", flush=True)
    return found


def problem(text: str, schema: Any) -> str:
    """Why a text is no JSON of a schema; empty if it is."""
    try:
        checker = jsonschema.FormatChecker()
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error)[:100] or "no reason given"
    return ""


# ---- tables


def tables(kept: Figures) -> Iterator[str]:
    host = kept["machine"]
    yield f"{host['cpu']}, {host['cores']} cores, Python {host['python']}; {versions(kept)}. SmolLM2."
    for name, found in kept["answers"].items():
        total, ended, wrong, tokens = (sum(row[key] for row in found.values()) for key in COUNTS)
        yield (
            f"Answers at temperature {TEMPERATURE}, {name}: {total} of {len(found)} schemas, {tokens} tokens; {ended} "
            f"ended within {MAX_TOKENS} tokens, of which {wrong} were not valid."
        )
    costs = kept["costs"]
    yield f"Decoding without a schema: {costs['decoding ms']:.2f} ms a token."
    heads = [f"{name}: ended" for name in kept["answers"]]
    heads += ["first mask, ms", "a token, us: median", "mean", "most", "mean, of decoding"]
    yield "| schema | " + " | ".join(heads) + " |\n|---" + "|---" * len(heads) + "|\n" + "\n".join(rows(kept))


COUNTS = "answers", "ended", "wrong", "tokens"


def rows(kept: Figures) -> Iterator[str]:
    for name, cost in kept["costs"]["schemas"].items():
        ended = [f"{found[name]['ended']} of {found[name]['answers']}" for found in kept["answers"].values()]
        times = [f"{cost['first mask ms']:.1f}", *(f"{cost[key]}" for key in ("median us", "mean us", "most us"))]
        yield "| " + " | ".join([name, *ended, *times, f"{cost['of decoding']:.1%}"]) + " |"


def versions(kept: Figures) -> str:
    return ", ".join(f"{name} {version}" for name, version in kept["versions"].items())


def with_tables(document: str, name: str, kept: Figures) -> str:
    """A document with the tables of a file of that name. Raises ReportError if it has no place for them."""
    return report.with_block(document, name, "\n\n".join(tables(kept)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, metavar="N")
    parser.add_argument("--all-tokens", action="store_true", help="Sample from all tokens: no top-k, top-p, min-p.")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="Keep the figures, beside those that it has.")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="Write the tables of --out there.")
    options = parser.parse_args()
    kept: Figures = {"answers": {}}
    if options.out and options.out.exists():
        kept = json.loads(options.out.read_text(encoding="utf-8"))
    if options.write:
        document = options.write.read_text(encoding="utf-8")
        name = options.out.as_posix()
        try:
            options.write.write_text(with_tables(document, name, kept), encoding="utf-8")
        except report.ReportError as error:
            sys.exit(f"constraints.py: {error}")
        return

    def keep() -> None:
        kept["machine"] = machine.description()
        kept["versions"] = {name: machine.package_version(name) for name in ("edgellm", "llguidance", "jsonschema")}
        if options.out:
            with replacing(options.out) as file:
                file.write((json.dumps(kept, indent=1) + "\n").encode())

    with edgellm.load("smollm2") as model:
        if options.answers:
            sampling = list(SAMPLING)[options.all_tokens]
            answers(model, options.answers, kept["answers"].setdefault(sampling, {}), SAMPLING[sampling], keep)
        else:
            kept["costs"] = costs(model)
            keep()
    if "costs" in kept:
        print("\n\n".join(tables(kept)))


if __name__ == "__main__":
    main()
