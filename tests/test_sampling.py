"""Samplers on a vocabulary of four tokens, against numbers worked out by hand; and against llama.cpp's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from golden.samplers_cases import BREAKERS, CASES, HISTORY, MIROSTAT, TEXTS, logits_of

from edgellm import samplers
from edgellm.breakers import breakers
from edgellm.errors import ArgumentError, BackendError
from edgellm.sampling import LARGEST, ORDER, RANGES, STAGES, Candidates, Sampler, SamplingParams

ALL = [0, 1, 2, 3]
LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
OFF = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
LLAMA_CPP = json.loads((Path(__file__).parent / "golden" / "samplers.json").read_text(encoding="utf-8"))


def test_top_k():
    for k, expected in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, ALL)):
        assert samplers.top_k(LOGITS, k).tolist() == expected


def test_top_k_keeps_ties():
    assert samplers.top_k(np.array([1, 2, 2, 0], np.float32), 1).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("p", "expected"), [(0, [1]), (0.39, [1]), (0.41, [1, 3]), (0.71, [1, 2, 3]), (0.95, ALL), (1, ALL)]
)
def test_top_p(p, expected):
    assert samplers.top_p(LOGITS, p).tolist() == expected


@pytest.mark.parametrize(("p", "expected"), [(1e-9, ALL), (0.3, [1, 2, 3]), (0.6, [1, 3]), (1, [1])])
def test_min_p(p, expected):
    assert samplers.min_p(LOGITS, p).tolist() == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0, [3]), (0.29, [3]), (0.31, [2, 3]), (0.49, [2, 3]), (0.51, [1, 2, 3]), (0.91, ALL)]
)
def test_typical(p, expected):
    """Surprise is 2.30, 0.92, 1.61, 1.20 nats, of which 1.28 are expected: token 3 is nearest, then 2, 1 and 0."""
    assert samplers.typical(LOGITS, p).tolist() == expected


def test_typical_puts_impossible_tokens_last():
    assert samplers.typical(np.array([-np.inf, 0, -200, 0], np.float32), 0.9).tolist() == [1, 3]


def test_top_n_sigma():
    """Of 0, 1, 2, 9 the deviation is 3.54; what is excluded does not count."""
    logits = np.array([0, 1, 2, 9, -np.inf], np.float32)
    for n, expected in ((1, [3]), (2, [2, 3]), (2.5, [1, 2, 3]), (3, ALL)):
        assert samplers.top_n_sigma(logits, n).tolist() == expected


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0, [0]), (0.05, [0]), (0.15, [0, 2]), (0.25, [0, 2, 3]), (0.35, ALL), (0.5, ALL)]
)
def test_xtc(threshold, expected):
    assert samplers.xtc(LOGITS, threshold).tolist() == expected


def test_xtc_leaves_out_the_top_choices_as_often_as_told():
    sample = Sampler(SamplingParams(**OFF, xtc_probability=0.25, xtc_threshold=0.35, seed=1))
    counts = np.bincount([sample(LOGITS, []) for _ in range(8000)], minlength=4) / 8000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.2, 0.3], atol=0.02)  # one likely token is left alone
    sample = Sampler(SamplingParams(**OFF, xtc_probability=0.25, xtc_threshold=0.25, seed=1))
    counts = np.bincount([sample(LOGITS, []) for _ in range(8000)], minlength=4) / 8000
    left_out = np.array([1 / 6, 0, 2 / 6, 3 / 6])
    np.testing.assert_allclose(counts, 0.75 * np.exp(LOGITS) + 0.25 * left_out, atol=0.02)


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2, -2, 1, 0], np.float32)
    assert samplers.penalties(logits, [0, 1, 0], 2, 0, 0).tolist() == [1, -4, 1, 0]
    assert logits.tolist() == [2, -2, 1, 0]


def test_frequency_and_presence_penalties():
    logits = np.array([2, -2, 1, 0], np.float32)
    assert samplers.penalties(logits, [0, 1, 0], 1, 0.5, 0).tolist() == [1, -2.5, 1, 0]
    assert samplers.penalties(logits, [0, 1, 0], 1, 0, 0.25).tolist() == [1.75, -2.25, 1, 0]
    assert samplers.penalties(logits, [0, 1, 0], 2, 0.5, 0.25).tolist() == [-0.25, -4.75, 1, 0]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], {}),
        ([1], {}),
        ([1, 2, 3], {2: 0, 3: 0}),
        ([1, 2, 3, 1, 2], {2: 0, 3: 2, 1: 0}),
        ([3, 1, 2, 0, 3, 1, 2], {1: 0, 2: 0, 0: 3, 3: 0}),
        ([1, 1, 1, 1], {1: 3}),
        ([2, 1, 3, 1, 0, 2, 1], {1: 0, 3: 2, 0: 1, 2: 0}),
    ],
)
def test_repeats(ids, expected):
    assert samplers.repeats(ids, {}) == expected


@pytest.mark.parametrize(
    ("breakers", "expected"),
    [
        ({0: [()]}, {3: 0, 1: 1, 2: 1}),  # a 0 two tokens back: one token counts, and 0 itself is not penalized
        ({0: [(3,)]}, {3: 0, 1: 0, 2: 0, 0: 0}),  # 0 3 is the breaker
        ({0: [(1,)]}, {3: 0, 1: 2, 2: 2, 0: 0}),  # what is no breaker here
        ({3: [()]}, {1: 0, 2: 0, 0: 0}),
    ],
)
def test_repeats_do_not_go_beyond_breakers(breakers, expected):
    assert samplers.repeats([0, 3, 1, 0, 3, 2, 0, 3], breakers) == expected


def test_repeats_of_random_tokens_are_what_looking_everywhere_finds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = [int(id) for id in rng.integers(0, 3, rng.integers(0, 30))]
        expected = {}
        for at in range(1, len(ids)):
            length = next(n for n in range(at + 1) if n == at or ids[at - 1 - n] != ids[-1 - n])
            expected[ids[at]] = max(expected.get(ids[at], 0), length)
        assert samplers.repeats(ids, {}) == expected


def test_dry():
    logits = np.array([5, 5, 5, 5], np.float32)
    found = samplers.dry(logits, np.array([1, 3]), np.array([2, 4]), 0.5, 2, 2)
    assert found.tolist() == [5, 4.5, 5, 3]
    assert samplers.dry(logits, np.array([1]), np.array([9000]), 0.5, 2, 2)[1] < -1e29
    params = SamplingParams(temperature=0, dry_multiplier=1)
    assert Sampler(params)(np.array([0, 3, 2.5, 1], np.float32), [0, 1, 3, 0]) == 1  # one token is repeated
    assert Sampler(params)(np.array([0, 3, 2.5, 1], np.float32), [2, 0, 1, 3, 2, 0]) == 2  # two, and a third


def test_dynamic_temperature():
    """Uncertainty of [1/2, 1/4, 1/4, 0], three tokens: 1.5 bits of log2(3)."""
    logits = np.log(np.array([0.5, 0.25, 0.25, 1e-30], np.float32))
    logits[3] = -np.inf
    share = 1.5 / math.log2(3)
    assert samplers.dynamic_temperature(logits, 1, 0.5, 1) == pytest.approx(0.5 + share)
    assert samplers.dynamic_temperature(logits, 0.25, 0.75, 2) == pytest.approx(share**2)
    assert samplers.dynamic_temperature(np.zeros(4, np.float32), 1, 0.5, 3) == pytest.approx(1.5)
    assert samplers.dynamic_temperature(np.zeros(1, np.float32), 1, 0.5, 1) == 1
    assert samplers.dynamic_temperature(np.array([0, 99, 0, 0], np.float32), 1, 0.5, 1) == pytest.approx(0.5)


def test_mirostat_follows_the_surprise_it_is_told():
    bits = np.array([0.5, 0.25, 0.125, 0.125], np.float32)
    for most, expected in ((0.5, [0]), (1, [0]), (2.5, [0, 1]), (3, ALL)):
        assert samplers.below_surprise(np.log(bits), most).tolist() == expected
    sample = Sampler(SamplingParams(temperature=1, mirostat=2, mirostat_tau=0.5, mirostat_eta=0.5))
    assert sample(np.log(bits), []) == 0  # a bound of 1 bit leaves one token, whose surprise then is 0
    assert sample._most_surprise[-1] == pytest.approx(1 - 0.5 * (0 - 0.5))


def test_logit_bias_comes_first():
    biased = SamplingParams(temperature=0, logit_bias={2: 1.5, 1: -math.inf})
    assert Sampler(biased)(LOGITS, []) == 2
    assert not Sampler(biased).takes_best
    assert samplers.logit_bias(LOGITS, {0: 1, 3: -math.inf}).tolist() == [LOGITS[0] + 1, *LOGITS[1:3], -math.inf]
    with pytest.raises(ArgumentError, match="no token may come next"):
        Sampler(SamplingParams(logit_bias=dict.fromkeys(range(4), -math.inf)))(LOGITS, [])


def test_order_matters():
    """A temperature of 2 before top-p makes room for a third token."""
    orders = ["top_p", "temperature"], ["temperature", "top_p"]
    made = (Sampler(SamplingParams(temperature=2, top_p=0.65, seed=0, samplers=names)) for names in orders)
    assert [{sample(LOGITS, []) for _ in range(300)} for sample in made] == [{1, 3}, {1, 2, 3}]


def test_greedy_takes_the_first_of_equals_and_refuses_nan():
    assert samplers.greedy(np.array([0, 3, 3, 1], np.float32)) == 1
    with pytest.raises(BackendError, match="not numbers"):
        samplers.greedy(np.array([0, np.nan, 3, 1], np.float32))


def test_temperature_zero_is_greedy_whatever_else_is_kept():
    sample = Sampler(SamplingParams(temperature=0, top_k=2, top_p=0.1, min_p=1, top_n_sigma=1, seed=5))
    assert sample.takes_best
    assert [sample(LOGITS, []) for _ in range(5)] == [1] * 5
    assert Sampler(SamplingParams(temperature=0, xtc_probability=1, xtc_threshold=0.15))(LOGITS, []) == 2


def test_penalty_applies_to_greedy_and_to_recent_tokens_only():
    sample = Sampler(SamplingParams(temperature=0, repeat_penalty=2))
    logits = np.array([1, 2, 1.5, 0], np.float32)
    assert sample(logits, [1]) == 2
    assert sample(logits, [1] + [3] * 64) == 1
    assert Sampler(SamplingParams(temperature=0, repeat_penalty=2, repeat_last_n=2))(logits, [1, 3, 3]) == 1
    assert Sampler(SamplingParams(temperature=0, repeat_penalty=2, repeat_last_n=0)).takes_best


def test_same_seed_same_tokens():
    draws = [[Sampler(SamplingParams(seed=seed))(LOGITS, []) for _ in range(1)] for seed in (1, 1)]
    assert draws[0] == draws[1]
    sample, again = (Sampler(SamplingParams(seed=3)) for _ in range(2))
    assert [sample(LOGITS, []) for _ in range(50)] == [again(LOGITS, []) for _ in range(50)]


def test_draws_follow_the_probabilities():
    sample = Sampler(SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=0))
    counts = np.bincount([sample(LOGITS, []) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.2, 0.3], atol=0.015)


def test_temperature_sharpens_after_the_filters():
    sample = Sampler(SamplingParams(temperature=0.5, top_k=2, top_p=1, min_p=0, seed=0))
    counts = np.bincount([sample(LOGITS, []) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0, 16 / 25, 0, 9 / 25], atol=0.015)


@pytest.mark.parametrize("n", [63, 64, 700, 5000])
def test_top_k_and_top_p_of_many(n):
    rng = np.random.default_rng(n)
    for logits in (rng.standard_normal(n), rng.integers(0, 30, n), np.zeros(n), -np.arange(n), rng.normal(0, 9, n)):
        logits = logits.astype(np.float32)
        for k in (1, 5, 40, n - 1):
            assert len(samplers.top_k(logits, k)) == (logits >= np.sort(logits)[-k]).sum()
        order = np.argsort(-logits, kind="stable")
        for p in (0.1, 0.5, 0.9, 0.999):
            before = np.cumsum(samplers.softmax(logits)[order]) < p
            assert samplers.top_p(logits, p).tolist() == sorted(order[: before.sum() + 1])


@pytest.mark.parametrize("spread", [9, 4, 1, 0])
def test_top_p_looks_at_few_tokens_first(spread, monkeypatch):
    """Its choice is that of all of them in order."""
    logits = np.random.default_rng(0).normal(0, spread, 40_000).astype(np.float32)
    found = [samplers.top_p(logits, p).tolist() for p in (0.1, 0.5, 0.9, 0.999)]
    monkeypatch.setattr(samplers, "LIKELY", ())
    assert found == [samplers.top_p(logits, p).tolist() for p in (0.1, 0.5, 0.9, 0.999)]
    assert len(found[0]) < len(found[-1])


def test_tokens_are_drawn_as_from_the_whole_vocabulary():
    """What top-k leaves is all that the other filters are given: it changes nothing."""
    rng = np.random.default_rng(0)
    for seed in range(300):
        logits = rng.normal(0, 3, 2000).astype(np.float32)
        filtered = logits
        for keep in (
            lambda x: samplers.top_k(x, 40),
            lambda x: samplers.top_p(x, 0.95),
            lambda x: samplers.min_p(x, 0.05),
        ):
            places = keep(filtered)
            filtered = np.where(np.isin(np.arange(2000), places), filtered, np.float32(-np.inf))
        expected = samplers.draw(filtered / np.float32(0.8), np.random.default_rng(seed))
        assert Sampler(SamplingParams(seed=seed))(logits, []) == expected


def test_logits_that_are_not_numbers_are_refused():
    logits = np.append(LOGITS, [np.nan] * 100).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(repeat_penalty=2)):
        with pytest.raises(BackendError, match="not numbers"):
            Sampler(params)(logits, [0])


def test_the_best_token_suffices_for_plain_greedy_alone():
    assert Sampler(SamplingParams(temperature=0, top_k=3)).takes_best
    for changes in ({"repeat_penalty": 1.1}, {"presence_penalty": 1}, {"dry_multiplier": 1}, {"typical_p": 0.5},
                    {"xtc_probability": 0.1}, {"logit_bias": {1: 1}}, {"dynatemp_range": 1}):  # fmt: skip
        assert not Sampler(SamplingParams(temperature=0, **changes)).takes_best
    assert not Sampler(SamplingParams()).takes_best


def test_excluded_tokens_are_never_drawn():
    logits = np.array([-math.inf, 0, -math.inf, -math.inf], np.float32)
    for params in (SamplingParams(temperature=2, seed=0), SamplingParams(**OFF), SamplingParams(mirostat=2)):
        sample = Sampler(params)
        assert {sample(logits, []) for _ in range(100)} == {1}


# Against llama.cpp (tests/golden/samplers_cases.py).


def left_of(params, ids, logits, breakers=None):
    """What is left before a token is drawn: {token: logit}."""
    sampler = Sampler(SamplingParams(**params), breakers)
    if params.get("logit_bias"):
        logits = samplers.logit_bias(logits, params["logit_bias"])
    left = Candidates(logits, ids, breakers or {}, np.random.default_rng(0))
    for name in params.get("samplers", ORDER):
        if STAGES[name].is_on(sampler._params):
            STAGES[name].apply(left, sampler._params)
    return {left.token(place): float(logit) for place, logit in enumerate(left.logits) if logit > -math.inf}


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: json.dumps(CASES[case])[1:60])
def test_chains_leave_what_llama_cpp_leaves(case):
    expected = {int(id): logit for id, logit in LLAMA_CPP["chains"][case].items()}
    found = left_of(CASES[case], HISTORY, logits_of(case))
    assert sorted(found) == sorted(expected)
    for id, logit in expected.items():
        assert found[id] == pytest.approx(logit, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("case", range(len(TEXTS)))
def test_dry_breakers_are_llama_cpps(smollm2, case):
    """Of SmolLM2's vocabulary: within a token, over several, and within a character."""
    case, text = LLAMA_CPP["dry"][case], TEXTS[case]
    assert smollm2.tokenize(text) == case["ids"]
    params = {**OFF, "dry_multiplier": 1.0, "dry_sequence_breakers": BREAKERS}
    found = left_of(params, case["ids"], np.zeros(49152, np.float32), breakers(smollm2.tokenizer, BREAKERS))
    assert {str(id): pytest.approx(logit) for id, logit in found.items() if logit} == case["changed"]


def test_mirostat_is_llama_cpps(monkeypatch):
    """Given the tokens that it drew, each step leaves the same ones."""
    sampler, left = Sampler(SamplingParams(**MIROSTAT)), []
    for step, expected in enumerate(LLAMA_CPP["mirostat"]):
        monkeypatch.setattr(samplers, "draw", lambda logits, rng, e=expected: e["left"].index(e["token"]))
        monkeypatch.setattr(Candidates, "token", lambda self, place: left.append(self._tokens.tolist()) or place)
        sampler(logits_of(step), [])
        assert left[-1] == expected["left"]


# Arguments.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, "temperature is -1; expected a number of at least 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5; expected a number of at least 0 and at most 1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"typical_p": 2}, "typical_p is 2"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"repeat_penalty": math.inf}, "repeat_penalty is inf"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0; expected a number of at least 1e-06"),
        ({"repeat_penalty": 1e-308}, "repeat_penalty is 1e-308; expected"),
        ({"temperature": 1e308}, r"temperature is 1e\+308; expected a number of at least 0 and at most 1e\+06"),
        ({"logit_bias": {1: 1e308}}, r"a logit_bias is 1e\+308; expected -1e\+06 to 1e\+06, or -inf"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number"),
        ({"top_k": 10**30}, "top_k is 1000.* at most 2.14748e"),
        ({"repeat_last_n": 0.5}, "repeat_last_n is 0.5; expected a whole number"),
        ({"seed": 2.5}, "seed is 2.5; expected a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected at most 18446744073709551615"),
        ({"dry_sequence_breakers": ["\ud800"]}, "dry_sequence_breakers has .* whole characters"),
        ({"repeat_last_n": -1}, "repeat_last_n is -1"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf; expected a number"),
        ({"dry_base": 0.5}, "dry_base is 0.5"),
        ({"seed": -1}, "seed is -1"),
        ({"mirostat": 1}, "mirostat is 1; expected 2, or 0 for none"),
        ({"logit_bias": {1: math.nan}}, "a logit_bias is nan"),
        ({"logit_bias": {1: math.inf}}, "a logit_bias is inf"),
        ({"samplers": ["top_z"]}, "samplers has 'top_z'; expected a list of: penalties, dry"),
        ({"samplers": "top_k"}, "samplers has 'top_k'; expected a list"),
        ({"samplers": ["top_k", "top_k"]}, "names one twice"),
        ({"samplers": ["top_k"], "min_p": 0.1}, "min_p is 0.1, but samplers leaves out min_p"),
        ({"samplers": ["top_k"], "temperature": 0}, "temperature is 0, but samplers leaves out temperature"),
        ({"mirostat": 2, "top_k": 50}, "top_k is 50, but mirostat takes its place"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(ArgumentError, match=message):
        SamplingParams(**changes)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_give_a_token(sign):
    """All of them together: no logit becomes infinite, or none."""
    bounds = {name: pair[sign > 0] for name, pair in RANGES.items() if name not in ("top_k", "min_p", "top_p")}
    sampler = Sampler(SamplingParams(**bounds, seed=0, logit_bias={1: sign * LARGEST}), {})
    assert 0 <= sampler(np.linspace(-30, 30, 100, dtype=np.float32), [1, 2, 3, 1, 2] * 30) < 100


def test_an_empty_breaker_is_refused(stories):
    with pytest.raises(ArgumentError, match="dry_sequence_breaker is empty"):
        stories.generate("Once", max_tokens=1, dry_multiplier=1, dry_sequence_breakers=["a", ""])


def test_a_bias_of_no_token_is_refused(stories):
    with pytest.raises(ArgumentError, match="logit_bias has token id 512; expected 0 to 511"):
        stories.generate("Once", max_tokens=1, logit_bias={512: 1})
