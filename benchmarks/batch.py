"""What 16 prompts gain when generate_batch makes their answers in the same steps, with the ids of one at a time.

python benchmarks/batch.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import edgellm

PROMPTS = [
    f"{word} is" for word in ("Paris", "Water", "A cat", "The moon", "Bread", "Rain", "Music", "Iron", "Snow", "A tree",
                              "The sea", "Gold", "A clock", "Salt", "Fire", "A book")
]  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "default samplers, temperature 0.8": {"seed": 1},
    "top-p 0.95 of all tokens": {"seed": 1, "top_k": 0, "min_p": 0.0},
    "repetition penalty 1.1": {"seed": 1, "repeat_penalty": 1.1},
}


def timed(make: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    begin = time.perf_counter()
    ids = make()
    return ids, sum(map(len, ids)) / (time.perf_counter() - begin)


def measure(model: edgellm.Model, rounds: int, options: dict[str, Any]) -> tuple[float, float, float]:
    """Tokens a second alone, in a batch, and how many times as many; medians over rounds that take turns."""
    alone, together = [], []
    for _ in range(rounds):
        expected, rate = timed(lambda: [model.generate(prompt, **options).ids for prompt in PROMPTS])
        alone.append(rate)
        found, rate = timed(lambda: [done.ids for done in model.generate_batch(PROMPTS, **options)])
        together.append(rate)
        if found != expected:
            sys.exit("batch.py: a batch gave other ids than one at a time")
    ratios = [b / a for a, b in zip(alone, together, strict=True)]
    return median(alone), median(together), median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="of each answer; default 48")
    parser.add_argument("--threads", type=int, metavar="N")
    arguments = parser.parse_args()
    with edgellm.load("smollm2", n_threads=arguments.threads, cache_bytes=0) as model:
        common = {"max_tokens": arguments.tokens, "ignore_eos": True}
        model.generate_batch(PROMPTS, **{**common, "max_tokens": 4})
        print(f"{'tokens/s, 16 prompts':36}{'alone':>8}{'batch':>8}{'times':>7}")
        for name, options in SAMPLING.items():
            one, many, ratio = measure(model, arguments.rounds, {**common, **options})
            print(f"{name:36}{one:>8.0f}{many:>8.0f}{ratio:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
