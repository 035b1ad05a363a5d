"""What answers after a schema cost, and whether they are valid.

    python benchmarks/constraints.py                 time of the first mask, and per token beside the decoding
    python benchmarks/constraints.py --answers 1000  random answers: how many end, and whether those are valid

Needs the extras structured and dev.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import jsonschema
import numpy as np

import edgellm
from edgellm.arrays import F32
from edgellm.structured.constraint import Constraint, Vocabulary, grammar_for

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("schemas.json").read_text(encoding="utf-8"))


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


def measure(model: edgellm.Model) -> None:
    begin = time.perf_counter()
    vocabulary = Vocabulary(model.tokenizer)
    print(f"vocabulary, once a model: {(time.perf_counter() - begin) * 1e3:.0f} ms")
    model.generate("Once", max_tokens=8)
    free = model.generate("Once upon a time", max_tokens=100, temperature=0, ignore_eos=True)
    decode = free.timings.generate_seconds / (free.timings.generated_tokens - 1)
    print(f"decoding without a schema: {decode * 1e3:.2f} ms a token\n")
    print("| schema | first mask, ms | a token, us: median | mean | most | mean, of decoding |")
    print("|---|---|---|---|---|---|")
    for name, schema in SCHEMAS.items():
        begin = time.perf_counter()
        constraint = Timed(vocabulary, grammar_for(json_schema=schema))
        constraint.mask(np.zeros(vocabulary.n_tokens, np.float32))
        first = time.perf_counter() - begin
        text = model.generate(f"A {name} in JSON: ", json_schema=schema, max_tokens=512, seed=1).ids
        constraint = Timed(vocabulary, grammar_for(json_schema=schema))
        logits = np.random.default_rng(0).standard_normal(vocabulary.n_tokens, np.float32)
        for id in text:
            constraint.mask(logits)
            constraint.accept(id)
        us = [1e6 * seconds for seconds in constraint.seconds]
        share = mean(us) / 1e6 / decode
        print(f"| {name} | {first * 1e3:.1f} | {median(us):.0f} | {mean(us):.0f} | {max(us):.0f} | {share:.1%} |")


def answers(model: edgellm.Model, n: int, first: int, **sampling: Any) -> None:
    ended = wrong = 0
    for seed in range(first, first + n):
        name = list(SCHEMAS)[seed % len(SCHEMAS)]
        answer = model.generate(
            f"A {name} in JSON: ", json_schema=SCHEMAS[name], max_tokens=512, temperature=1.5, seed=seed, **sampling
        )
        if answer.finish_reason == "length":
            print(f"not ended, seed {seed}, {name}: {answer.text[:60]!r}...")
            continue
        ended += 1
        try:
            checker = jsonschema.FormatChecker()
            jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=checker).validate(json.loads(answer.text))
        except (ValueError, jsonschema.ValidationError) as error:
            wrong += 1
            print(f"WRONG, seed {seed}, {name}: {answer.text!r}: {str(error)[:100]}")
    print(f"{n} answers at temperature 1.5: {ended} ended within 512 tokens, of these {wrong} are wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--all-tokens", action="store_true", help="Sample from all tokens: no top-k, top-p, min-p.")
    options = parser.parse_args()
    sampling = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} if options.all_tokens else {}
    with edgellm.load("smollm2") as model:
        if options.answers:
            answers(model, options.answers, options.first, **sampling)
        else:
            measure(model)


if __name__ == "__main__":
    main()
