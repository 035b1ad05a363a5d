"""Real weights: Gemma 3 270M (Q4_K_M) against llama.cpp in float32 arithmetic (tests/golden/gemma3.json)."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import shared

from edgellm.api import Model
from edgellm.perplexity import perplexity

CASES = json.loads((Path(__file__).parent / "golden" / "gemma3.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_greedy_tokens(gemma3, case):
    """Equal, up to the first step where the reference's two likeliest tokens are closer than 0.05."""
    ids = gemma3.generate(case["prompt"], max_tokens=32, temperature=0, ignore_eos=True).ids
    first_close = next((i for i, gap in enumerate(case["top2_gaps"]) if gap < 0.05), 32)
    assert gemma3.tokenize(case["prompt"]) == case["prompt_ids"]
    assert ids[:first_close] == case["greedy_ids"][:first_close]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_every_greedy_token_given_the_ones_before(gemma3, case):
    ids = case["prompt_ids"] + case["greedy_ids"]
    found = gemma3.logits(ids[:-1])[len(case["prompt_ids"]) - 1 :].argmax(axis=1)
    clear = np.array(case["top2_gaps"]) >= 0.05
    np.testing.assert_array_equal(found[clear], np.array(case["greedy_ids"])[clear])


def test_the_ids_are_those_of_llama_cpp(gemma3):
    """From the tables of the .edge file."""
    golden = json.loads(shared("golden/tokens.json").read_text(encoding="utf-8"))["models"]["gemma-3-270m-q4_k_m.gguf"]
    assert len(golden) == 23
    for name, entry in golden.items():
        assert gemma3.tokenize(entry["text"], add_special=False) == entry["ids"], name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_perplexity(gemma3, backend):
    """llama-perplexity on the same weights in float32: 15.2346; after 40 chunks 17.1292, where the reference gives
    17.1262, cpu 17.1371: edgellm perplexity gemma3-270m TEXT --chunks 40 --backend cpu"""
    text = shared("data/text/wikitext-2-raw-test.txt").read_bytes()[:100_000].decode()
    with Model(gemma3.path, backend=backend) as model:
        *_, result = perplexity(model, text, context=512, chunks=4)
    assert result.value == pytest.approx(15.2346, rel=3e-3 if backend == "cpu" else 1e-3)
