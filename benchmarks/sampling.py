"""What choosing one token costs: microseconds, medians, for vocabularies of SmolLM2's and Gemma 3's size.

python benchmarks/sampling.py
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from edgellm.sampling import Sampler, SamplingParams

RUNS = 300
VOCABULARIES = (49_152, 262_144)
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "default, repetition penalty": {"repeat_penalty": 1.1},
    "greedy, repetition penalty": {"temperature": 0, "repeat_penalty": 1.1},
    "no top-k": {"top_k": 0},
    "DRY": {"dry_multiplier": 0.8},
    "XTC": {"xtc_probability": 0.5},
    "top-n-sigma": {"top_n_sigma": 1.0},
    "typical": {"typical_p": 0.9},
    "dynamic temperature": {"dynatemp_range": 0.3},
    "mirostat": {"mirostat": 2},
}


def microseconds(params: dict[str, Any], vocabulary: int) -> float:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (16, vocabulary)).astype(np.float32)
    logits[:, ::1000] += np.linspace(15, 5, len(logits[0, ::1000]), dtype=np.float32)  # a few tokens that fit
    ids = [int(id) for id in rng.integers(0, 50, 500)]
    sampler, seconds = Sampler(SamplingParams(seed=0, **params)), []
    for run in range(RUNS):
        start = time.perf_counter()
        sampler(logits[run % len(logits)], ids)
        seconds.append(time.perf_counter() - start)
    return 1e6 * median(seconds)


if __name__ == "__main__":
    print(f"{'':30}" + "".join(f"{vocabulary:>10}" for vocabulary in VOCABULARIES))
    for name, params in CASES.items():
        print(f"{name:30}" + "".join(f"{microseconds(params, vocabulary):>10.0f}" for vocabulary in VOCABULARIES))
