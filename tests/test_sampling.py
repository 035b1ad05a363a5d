"""Samplers on a vocabulary of four tokens, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from edgellm import sampling
from edgellm.errors import ArgumentError, BackendError
from edgellm.sampling import Sampler, SamplingParams

INF, ALL = -math.inf, [0, 1, 2, 3]
LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def kept(logits):
    return np.flatnonzero(np.isfinite(logits)).tolist()


@pytest.mark.parametrize(("k", "expected"), [(0, ALL), (1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, ALL)])
def test_top_k(k, expected):
    assert kept(sampling.top_k(LOGITS, k)) == expected


def test_top_k_keeps_ties():
    assert kept(sampling.top_k(np.array([1, 2, 2, 0], np.float32), 1)) == [1, 2]


@pytest.mark.parametrize(
    ("p", "expected"), [(0, [1]), (0.39, [1]), (0.41, [1, 3]), (0.71, [1, 2, 3]), (0.95, ALL), (1, ALL)]
)
def test_top_p(p, expected):
    assert kept(sampling.top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0, [0, 1, 2, 3]), (0.3, [1, 2, 3]), (0.6, [1, 3]), (1, [1])])
def test_min_p(p, expected):
    assert kept(sampling.min_p(LOGITS, p)) == expected


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2, -2, 1, 0], np.float32)
    assert sampling.repeat_penalty(logits, [0, 1, 0], 2).tolist() == [1, -4, 1, 0]
    assert logits.tolist() == [2, -2, 1, 0]


def test_greedy_takes_the_first_of_equals_and_refuses_nan():
    assert sampling.greedy(np.array([0, 3, 3, 1], np.float32)) == 1
    with pytest.raises(BackendError, match="not numbers"):
        sampling.greedy(np.array([0, np.nan, 3, 1], np.float32))


def test_temperature_zero_is_greedy_whatever_else_is_set():
    sample = Sampler(SamplingParams(temperature=0, top_k=2, top_p=0.1, min_p=1, seed=5))
    assert [sample(LOGITS, []) for _ in range(5)] == [1] * 5


def test_penalty_applies_to_greedy_and_to_recent_tokens_only():
    sample = Sampler(SamplingParams(temperature=0, repeat_penalty=2))
    logits = np.array([1, 2, 1.5, 0], np.float32)
    assert sample(logits, [1]) == 2
    assert sample(logits, [1] + [3] * sampling.REPEAT_WINDOW) == 1


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
def test_top_k_of_many(n):
    rng = np.random.default_rng(n)
    for logits in (rng.standard_normal(n), rng.integers(0, 30, n), np.zeros(n), -np.arange(n)):
        for k in (1, 5, 40, n - 1):
            assert len(kept(sampling.top_k(logits.astype(np.float32), k))) == (logits >= np.sort(logits)[-k]).sum()


def test_tokens_are_drawn_as_from_the_whole_vocabulary():
    """What top-k leaves is all that the other filters are given: it changes nothing."""
    rng = np.random.default_rng(0)
    for seed in range(300):
        logits = rng.normal(0, 3, 2000).astype(np.float32)
        filtered = sampling.min_p(sampling.top_p(sampling.top_k(logits, 40), 0.95), 0.05)
        expected = sampling.draw(filtered / np.float32(0.8), np.random.default_rng(seed))
        assert Sampler(SamplingParams(seed=seed))(logits, []) == expected


def test_logits_that_are_not_numbers_are_refused():
    logits = np.append(LOGITS, [np.nan] * 100).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(repeat_penalty=2)):
        with pytest.raises(BackendError, match="not numbers"):
            Sampler(params)(logits, [0])


def test_the_best_token_suffices_for_plain_greedy_alone():
    assert Sampler(SamplingParams(temperature=0, top_k=3)).takes_best
    assert not Sampler(SamplingParams(temperature=0, repeat_penalty=1.1)).takes_best
    assert not Sampler(SamplingParams()).takes_best


def test_excluded_tokens_are_never_drawn():
    logits = np.array([INF, 0, INF, INF], np.float32)
    sample = Sampler(SamplingParams(temperature=2, seed=0))
    assert {sample(logits, []) for _ in range(100)} == {1}


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 1.5},
              {"top_p": -0.1}, {"min_p": 2}, {"repeat_penalty": 0}, {"repeat_penalty": math.inf}, {"seed": -1}],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        SamplingParams(**wrong)
