"""How likely tokens were: against the log-softmax of the model's logits, whatever else goes on beside them."""

import threading

import numpy as np
import pytest
from conftest import BUNDLED

from edgellm.answer import Piece
from edgellm.api import Model
from edgellm.errors import ArgumentError, BackendError, ContextOverflowError
from edgellm.logprobs import Logprob, logprob

PROMPT = "Once upon a time there was a little girl. She went to the park with her mom."

CLOSE = 3e-5
"""NumPy multiplies one row and many of them in another order; logits are up to 20."""


@pytest.fixture(scope="module", params=["cpu", "reference"])
def stories(request):
    with Model(BUNDLED, backend=request.param) as model:
        yield model


def expected(model, ids):
    """(n - 1,) of each token but the first, and (n - 1, tokens) of all there are in its place."""
    logits = model.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found[np.arange(len(ids) - 1), ids[1:]], found


def check(model, done, n_top):
    ids = done.prompt_ids + done.ids
    of_each, of_all = expected(model, ids)
    found = [*done.prompt_logprobs, *done.logprobs[: len(done.ids)]]
    assert [each.id for each in found] == ids[1:]
    np.testing.assert_allclose([each.logprob for each in found], of_each, atol=CLOSE)
    best = -np.sort(-of_all, axis=1)[:, :n_top]
    np.testing.assert_allclose([[value for _, value in each.top] for each in found], best, atol=CLOSE)
    for each, row in zip(found, of_all, strict=True):
        np.testing.assert_allclose([row[id] for id, _ in each.top], [value for _, value in each.top], atol=CLOSE)


OPTIONS = [
    {"temperature": 0},
    {"seed": 1, "temperature": 1.5},
    {"temperature": 0, "speculate": 4},
    {"temperature": 0, "regex": " [a-z ]{40}"},
    {"temperature": 0, "stop": [" the"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answer_and_prompt(stories, options):
    plain = stories.generate(PROMPT, max_tokens=40, **options)
    done = stories.generate(PROMPT, max_tokens=40, logprobs=3, prompt_logprobs=3, **options)
    assert done.ids == plain.ids
    check(stories, done, 3)


def test_what_was_taken_back_is_not_noted(stories):
    """Tokens that a banned string excludes count as impossible, so the others of their place are likelier."""
    done = stories.generate(PROMPT, max_tokens=40, temperature=0, logprobs=3, banned_strings=["dog", "ball", "big"])
    of_each, _ = expected(stories, done.prompt_ids + done.ids)
    of_each = of_each[len(done.prompt_ids) - 1 :]
    found = np.array([each.logprob for each in done.logprobs])
    assert [each.id for each in done.logprobs] == done.ids
    same = np.isclose(found, of_each, atol=CLOSE)
    assert 0 < (~same).sum() < len(same) / 2
    assert (found[~same] > of_each[~same]).all()


def test_many_at_once(stories):
    """In chunks of the prompt, beside others that begin alike, and whatever caches hold."""
    prompts = [PROMPT * 8, PROMPT, PROMPT * 8, PROMPT * 2, ""]
    for done in stories.generate_batch(prompts, max_tokens=5, logprobs=2, prompt_logprobs=2, seed=2):
        check(stories, done, 2)


def test_a_prompt_alone(stories):
    done = stories.generate(PROMPT, max_tokens=0, prompt_logprobs=1)
    assert (done.ids, done.logprobs, done.finish_reason) == ([], [], "length")
    check(stories, done, 1)
    assert stories.generate("", max_tokens=0, prompt_logprobs=1).prompt_logprobs == []


def test_they_are_there_when_the_engine_tells_of_a_token(stories):
    seen, over = [], threading.Event()

    def listen(event):
        if isinstance(event, Piece) and event.id is not None:
            seen.append((event.id, answer.completion.logprobs[len(seen)].id))
        elif not isinstance(event, Piece):
            over.set()

    answer = stories.begin_ids(stories.tokenize(PROMPT), max_tokens=20, temperature=0, logprobs=0, prompt_logprobs=0)
    stories.submit(answer, listen)
    assert over.wait(60)
    assert [told for told, _ in seen] == [noted for _, noted in seen] == answer.completion.ids
    check(stories, answer.completion, 0)


def test_by_hand():
    logits = np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32)) + np.float32(3)
    found = logprob(logits, 2, 3)
    assert found.id == 2
    assert found.logprob == pytest.approx(np.log(0.125), abs=1e-6)
    assert [id for id, _ in found.top] == [1, 3, 0]
    assert logprob(np.array([0, -np.inf], np.float32), 0, 9) == Logprob(0, 0.0, [(0, 0.0), (1, -np.inf)])
    with pytest.raises(BackendError, match="not numbers"):
        logprob(np.array([0, np.nan], np.float32), 0, 0)


def test_wrong_numbers(stories):
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ArgumentError, match=f"{name} is -1; expected a whole number"):
            stories.generate(PROMPT, **{name: -1})


def test_the_score_of_a_text(stories):
    ids = stories.tokenize(PROMPT)
    scored = stories.score(PROMPT)
    assert [each.id for each in scored] == ids[1:]
    np.testing.assert_allclose([each.logprob for each in scored], expected(stories, ids)[0], atol=CLOSE)
    assert stories.score("") == []
    with pytest.raises(ContextOverflowError):
        stories.score(PROMPT * 100)
