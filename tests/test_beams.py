"""Beam search against a search written down plainly, and against all answers there are, and against transformers."""

import itertools
import json
from functools import partial

import beams_cases
import numpy as np
import pytest
import tiny
import transformers_cases
from conftest import BUNDLED
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.api import Model
from edgellm.beams import beam_search
from edgellm.converters import convert
from edgellm.errors import ArgumentError, BackendError, ContextOverflowError
from edgellm.generate import Slot

CONTEXT = 64


@pytest.fixture(scope="module", params=["cpu", "reference"])
def stories(request):
    with Model(BUNDLED, backend=request.param) as model:
        yield model


def log_softmax(logits):
    logits = logits.astype(np.float64) - logits.max()
    return logits - np.log(np.exp(logits).sum())


class Table:
    """A model of a few tokens whose logits depend on the ids so far in any way."""

    MAX_ROWS = 64

    def __init__(self, n_tokens, seed):
        self.n_tokens, self.seed, self.held = n_tokens, seed, {}

    def logits(self, ids):
        return (3 * np.random.default_rng([self.seed, *ids]).standard_normal(self.n_tokens)).astype(np.float32)

    def open_slot(self):
        number = max(self.held, default=0) + 1
        self.held[number] = []
        return number

    def close_slot(self, slot):
        del self.held[slot]

    def trim(self, slot, length):
        del self.held[slot][length:]
        return length

    def copy(self, source, target, length):
        self.held[target] = self.held[source][:length]
        return length

    def run(self, step):
        found = []
        for i, (token, slot, position) in enumerate(zip(step.tokens, step.slots, step.positions, strict=True)):
            assert len(self.held[slot]) == position
            self.held[slot].append(int(token))
            if i in step.wanted:
                found.append(self.logits(self.held[slot]))
        return np.array(found, np.float32).reshape(-1, self.n_tokens)


def search(table, prompt, n_beams, max_tokens, **options):
    found = beam_search(partial(Slot, table, CONTEXT), prompt, n_beams, max_tokens, **options)
    assert not table.held
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.0]), st.booleans())
def test_with_beams_for_all_it_finds_the_best_answers_of_all(seed, n_tokens, length, length_penalty, has_end):
    """As many beams as there are answers: none is left out. No score of one that goes on rises where longer ones are
    not favoured, so that the search is not over too early."""
    table, ends = Table(n_tokens, seed), {0} if has_end else set()
    if has_end and length_penalty:
        length_penalty = 0.0
    answers = {
        answer[: answer.index(0) + 1] if has_end and 0 in answer else answer
        for answer in itertools.product(range(n_tokens), repeat=length)
    }

    def score(answer):
        logprobs = [log_softmax(table.logits([5, 6, *answer[:i]]))[id] for i, id in enumerate(answer)]
        return sum(logprobs) / len(answer) ** length_penalty

    found = search(table, [5, 6], len(answers), length, ends=ends, length_penalty=length_penalty)
    assert [tuple(beam.ids) for beam in found] == sorted(answers, key=score, reverse=True)
    np.testing.assert_allclose([beam.score(length_penalty) for beam in found], sorted(map(score, answers))[::-1])


def plainly(logits_of, prompt, n_beams, max_tokens, ends, length_penalty):
    """The same search without caches and classes."""
    live, whole = [((), 0.0)], []
    for length in range(1, max_tokens + 1):
        grown = [
            ((*ids, id), total + value)
            for ids, total in live
            for id, value in enumerate(log_softmax(logits_of([*prompt, *ids])))
        ]
        grown.sort(key=lambda each: -each[1])
        whole += [(ids, total / length**length_penalty) for ids, total in grown[:n_beams] if ids[-1] in ends]
        live = [each for each in grown if each[0][-1] not in ends][:n_beams]
        if length == max_tokens:
            whole += [(ids, total / length**length_penalty) for ids, total in live]
        whole = sorted(whole, key=lambda each: -each[1])[:n_beams]
        if not live or (len(whole) == n_beams and whole[-1][1] >= live[0][1] / length**length_penalty):
            break
    return whole


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999), st.integers(2, 12), st.integers(1, 5), st.integers(0, 9), st.sampled_from([0.0, 0.7, 1.0, 2.0])
)
def test_a_narrow_search_is_as_written_down(seed, n_tokens, n_beams, max_tokens, length_penalty):
    table, ends = Table(n_tokens, seed), {0, n_tokens - 1}
    found = search(table, [3, 4, 5], n_beams, max_tokens, ends=ends, length_penalty=length_penalty)
    expected = plainly(table.logits, [3, 4, 5], n_beams, max_tokens, ends, length_penalty) if max_tokens else []
    assert [tuple(beam.ids) for beam in found] == [ids for ids, _ in expected]
    np.testing.assert_allclose([beam.score(length_penalty) for beam in found], [score for _, score in expected])
    assert all(beam.is_ended == (beam.ids[-1] in ends) for beam in found)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """The model of tests/golden/beams_cases.py, in float32."""
    folder, case = tmp_path_factory.mktemp("beams"), transformers_cases.expected()[beams_cases.MODEL]
    transformers_cases.write_folder(folder / "model", case["config"], case["shapes"])
    convert(folder / "model", folder / "model.edge", format="f32", progress=False)
    with Model(folder / "model.edge", backend="reference", context_length=128) as model:
        yield model


@pytest.mark.parametrize("case", json.loads(beams_cases.GOLDEN.read_text()), ids=str)
def test_it_finds_what_transformers_finds(random_model, case):
    prompt = transformers_cases.IDS[: case["n_prompt"]]
    options = {"ends": case["ends"], "length_penalty": case["length_penalty"]}
    found = beam_search(random_model.open_slot, prompt, case["beams"], case["max_tokens"], **options)
    assert [beam.ids for beam in found] == case["answers"]
    scores = [beam.score(case["length_penalty"]) for beam in found]
    np.testing.assert_allclose(scores[: len(case["scores"])], case["scores"], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2"])
@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_of_caches_of_every_kind(kind, name):
    """Windows that are full, and convolutions, which keep less than is to be copied."""
    backend = tiny.backend(name, "q8" if kind == "cpu" else "f32", kind, context_length=CONTEXT)

    def logits(ids):
        slot = Slot(backend, CONTEXT)
        try:
            return slot.extend(ids)[0]
        finally:
            slot.close()

    prompt = [i % 7 for i in range(30)]
    found = beam_search(partial(Slot, backend, CONTEXT), prompt, 3, 12, ends=(9,))
    assert not backend._slots
    expected = plainly(logits, prompt, 3, 12, {9}, 1.0)
    backend.close()
    assert [tuple(beam.ids) for beam in found] == [ids for ids, _ in expected]
    np.testing.assert_allclose([beam.score(1.0) for beam in found], [score for _, score in expected], atol=1e-5)


def test_one_beam_is_greedy(stories):
    (done,) = stories.beam_search("Once upon a time", 1, max_tokens=60)
    greedy = stories.generate("Once upon a time", max_tokens=60, temperature=0)
    assert (done.ids, done.text, done.finish_reason) == (greedy.ids, greedy.text, greedy.finish_reason)


def test_answers_are_likelier_the_first_the_likeliest(stories):
    found = stories.beam_search("Once upon a time", 4, n=3, max_tokens=40)
    scores = [sum(each.logprob for each in done.logprobs) / len(done.logprobs) for done in found]
    assert len(found) == 3
    assert scores == sorted(scores, reverse=True)
    (greedy,) = stories.beam_search("Once upon a time", 1, max_tokens=40)
    assert sum(each.logprob for each in found[0].logprobs) > sum(each.logprob for each in greedy.logprobs)
    for done in found:
        whole = stories.logits(done.prompt_ids + done.ids)[len(done.prompt_ids) - 1 : -1]
        expected = [log_softmax(row)[id] for row, id in zip(whole, done.ids, strict=True)]
        np.testing.assert_allclose([each.logprob for each in done.logprobs], expected, atol=3e-5)


def test_what_cannot_be_is_an_error(stories):
    for beams, n in [(0, 1), (2, 3), (2, 0), (10**6, 1)]:
        with pytest.raises(ArgumentError, match=f"{n} answers of {beams} beams"):
            stories.beam_search("Once", beams, n=n)
    with pytest.raises(ContextOverflowError):
        stories.beam_search("Once", 2, max_tokens=10**6)
    with pytest.raises(ArgumentError, match="max_tokens is 0; expected 1 or more"):
        stories.beam_search("Once", 2, max_tokens=0)
    with pytest.raises(ArgumentError, match="length_penalty is nan; expected -10 to 10"):
        stories.beam_search("Once", 2, length_penalty=float("nan"))
    table = Table(3, 0)
    table.logits = lambda ids: np.array([0, np.nan, 0], np.float32)
    with pytest.raises(BackendError, match="not numbers"):
        search(table, [1], 2, 5)
