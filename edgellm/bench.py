"""Speed of a loaded model, measured as llama-bench measures: prompt processing and generation apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from edgellm.api import Model
from edgellm.generate import Slot


def bench(model: Model, n_prompt: int, n_generate: int, depth: int, repeats: int) -> list[dict[str, Any]]:
    """For ppN and tgN, each unless its N is 0: {"test", "n_tokens", "median", "min", "max", "runs"} in tokens/s.

    Tokens are drawn at random, so a generated token costs its evaluation and nothing else. Before each run the slot
    holds `depth` tokens; the first run of each test is not counted.
    """
    rng, slot = np.random.default_rng(0), model.open_slot()

    def draw(n: int) -> list[int]:
        return [int(id) for id in rng.integers(0, model.config.vocab_size, n)]

    def prompt() -> None:
        slot.extend(draw(n_prompt))

    def generate() -> None:
        for id in draw(n_generate):
            slot.extend([id])

    tests = [(f"pp{n_prompt}", n_prompt, prompt), (f"tg{n_generate}", n_generate, generate)]
    try:
        return [_measure(name, n, run, slot, draw(depth), repeats) for name, n, run in tests if n]
    finally:
        slot.close()


def _measure(name: str, n: int, run: Callable[[], None], slot: Slot, before: list[int], repeats: int) -> dict[str, Any]:
    rates = []
    for _ in range(repeats + 1):
        kept = slot.reuse(before)
        if before:
            slot.extend(before[kept:])
        started = time.perf_counter()
        run()
        rates.append(n / (time.perf_counter() - started))
    counted = rates[1:]
    return {
        "test": name,
        "n_tokens": n,
        "median": median(counted),
        "min": min(counted),
        "max": max(counted),
        "runs": counted,
    }
