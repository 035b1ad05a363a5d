"""Log-likelihoods of answers: by hand, one by one, and against lm-evaluation-harness on real weights."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BUNDLED, shared
from tiny_tokenizers import byte_level, sentencepiece, tokenizer

from edgellm import tasks
from edgellm.api import Model
from edgellm.errors import ArgumentError, BackendError, ContextOverflowError
from edgellm.evaluation import LANES, Scored, answers, tokenized
from edgellm.generate import Slot
from edgellm.tasks import Question

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from evaluation_cases import COUNT, FILES  # noqa: E402

EXPECTED = json.loads((GOLDEN / "evaluation.json").read_text(encoding="utf-8"))["tasks"]

NEXT = np.array([[8, 4, 2, 2], [1, 1, 1, 1], [4, 2, 1, 1], [0.5, 0.25, 0.125, 0.125]], np.float32)
"""How likely each of four tokens is after each, up to a factor."""


class Bigrams:
    """A backend whose logits follow from one token alone, and which counts what it evaluates."""

    def __init__(self, max_rows=128):
        self.MAX_ROWS, self.held, self.rows, self.steps = max_rows, {}, 0, 0

    def open_slot(self):
        self.held[slot := len(self.held)] = 0
        return slot

    def close_slot(self, slot):
        del self.held[slot]

    def trim(self, slot, length):
        self.held[slot] = length
        return length

    def run(self, step):
        assert len(step.tokens) <= self.MAX_ROWS
        for slot, rows in step.by_slot:
            positions = step.positions[rows].tolist()
            assert positions == [*range(self.held[slot], self.held[slot] + len(positions))]
            self.held[slot] += len(positions)
        self.rows, self.steps = self.rows + len(step.tokens), self.steps + 1
        return np.log(NEXT[step.tokens[step.wanted]])


def ask(backend, questions):
    model = SimpleNamespace(open_slot=lambda: Slot(backend, 64))
    found = dict(answers(model, questions))
    assert backend.held == {}
    return [found[i] for i in range(len(questions))]


def scored(*ids, n):
    return Scored(list(ids), n, 0)


QUESTIONS = [
    [scored(1, 2, 0, 0, n=2), scored(1, 2, 0, 1, n=2), scored(1, 2, 3, n=1)],
    [scored(3, 0, n=1)],
    [scored(0, 1, 2, 3, n=3), scored(3, 3, n=1)],
]
LIKELIHOODS = [[1 / 2 * 1 / 2, 1 / 2 * 1 / 4, 1 / 8], [1 / 2], [1 / 4 * 1 / 4 * 1 / 8, 1 / 8]]
GREEDY = [[True, False, False], [True], [False, False]]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 128])
def test_likelihoods_by_hand(max_rows):
    found = ask(Bigrams(max_rows), QUESTIONS)
    for said, likelihoods, greedy in zip(found, LIKELIHOODS, GREEDY, strict=True):
        assert [math.exp(answer.log_likelihood) for answer in said] == pytest.approx(likelihoods)
        assert [answer.greedy for answer in said] == greedy


def test_a_shared_context_is_evaluated_once():
    """Forty tokens and three answers of two: the context, and of each answer its last token before the scored ones."""
    backend, context = Bigrams(), [1] * 40
    ask(backend, [[scored(*context, 0, id, n=2) for id in range(3)]])
    assert backend.rows == 41 + 2 * 2
    backend = Bigrams()
    ask(backend, [[scored(*context, id, n=1) for id in range(3)]] * LANES)
    assert backend.rows == LANES * (40 + 2)


def test_steps_are_full():
    backend = Bigrams()
    questions = [[scored(n % 4, *[1] * (20 + n % 7), *[id] * 9, 0, n=9) for id in (0, 2, 3)] for n in range(100)]
    ask(backend, questions)
    assert backend.rows > 0.9 * 128 * backend.steps


def test_logits_that_are_not_numbers():
    backend = Bigrams()
    backend.run = lambda step: np.full((len(step.wanted), 4), np.nan, np.float32)
    with pytest.raises(BackendError, match="not numbers"):
        ask(backend, [[scored(0, 1, n=1)]])
    assert backend.held == {}


TEXTS = [
    Question((("Once upon a time, there was a little", "girl named Lily."), ("Once upon a time, there was a", "dog."))),
    Question((("Tom", "ran."),)),
    Question(tuple((f"{'The sun was hot and the day was long. ' * 9}{name}", "went home.") for name in ("Ben", "Sam"))),
] * 7


def one_by_one(model, answer):
    """The definition, on the logits of the whole text."""
    logits = model.logits(answer.ids[:-1]).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = answer.ids[-answer.n_scored :]
    rows = log_p[len(log_p) - len(targets) :]
    return rows[np.arange(len(targets)), targets].sum(), rows.argmax(axis=1).tolist() == targets


def test_many_at_a_time_equal_one_by_one(stories):
    questions = [tokenized(stories, question) for question in TEXTS]
    found = dict(answers(stories, questions))
    for number, question in enumerate(questions):
        for said, answer in zip(found[number], question, strict=True):
            log_likelihood, greedy = one_by_one(stories, answer)
            assert said.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
            assert said.greedy == greedy
    assert sorted(found) == [*range(len(TEXTS))]


def test_on_the_cpu_backend_the_batch_changes_no_bit():
    pytest.importorskip("numba")
    with Model(BUNDLED, backend="cpu") as model:
        questions = [tokenized(model, question) for question in TEXTS]
        together = dict(answers(model, questions))
        for number, question in enumerate(questions):
            assert dict(answers(model, [question])) == {0: together[number]}


def model_of(tokenizer, context_length=16):
    """As much of a model as tokenizing needs."""
    info = SimpleNamespace(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
    encode = tokenizer.encode
    return SimpleNamespace(info=info, tokenizer=tokenizer, tokenize=encode, context_length=context_length)


def test_white_space_goes_with_what_follows():
    made = model_of(tokenizer(byte_level()))
    with_space, without = (tokenized(made, Question(((context, "he"),)))[0] for context in ("a ", "a"))
    spaces = made.tokenize("a  he", add_special=False)
    assert (with_space.ids, with_space.n_scored) == (spaces, len(spaces) - 1)
    assert (without.ids, without.n_scored) == (made.tokenize("a he", add_special=False), 2)


def test_bos_comes_first_where_the_model_wants_it():
    made = model_of(tokenizer(sentencepiece()))
    assert tokenized(made, Question((("he", "ll"),)))[0].ids == made.tokenize("he ll")
    assert made.tokenize("he ll")[0] == made.info.bos_id
    byte = model_of(tokenizer(byte_level()))
    assert tokenized(byte, Question((("he", "ll"),)))[0].ids == byte.tokenize("he ll", add_special=False)


def test_an_empty_context_begins_with_bos_or_else_eos():
    for changes, first in (({}, 0), ({"bos_token_id": None}, 1)):
        metadata = {key: value for key, value in byte_level(**changes).items() if value is not None}
        made = model_of(tokenizer(metadata))
        (answer,) = tokenized(made, Question((("", "he"),)))
        assert (answer.ids, answer.n_scored) == ([first, *made.tokenize(" he", add_special=False)], 2)


def test_a_context_that_is_too_long_is_cut_at_its_front():
    made = model_of(tokenizer(byte_level()), context_length=4)
    (answer,) = tokenized(made, Question((("abcdefg", "he"),)))
    assert answer == Scored(made.tokenize("efg he", add_special=False), 2, 4)
    assert len(answer.ids) - 1 == 4
    with pytest.raises(ContextOverflowError, match=r"'xyzxyz' has 7 tokens; the context holds 4"):
        tokenized(made, Question((("a", "xyzxyz"),)))


def test_an_answer_needs_a_token_of_its_own():
    made = model_of(tokenizer(byte_level()))
    made.tokenize = lambda text, add_special: [5]
    with pytest.raises(ArgumentError, match=r"answer 'he' has no token of its own after 'a'"):
        tokenized(made, Question((("a", "he"),)))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_smollm2_says_what_the_harness_says(smollm2, task):
    """Each log-likelihood of the first questions, and what is made of them."""
    text = (shared("data/eval") / FILES[task]).read_text(encoding="utf-8")
    questions = tasks.questions(task, text, COUNT)
    found = dict(answers(smollm2, [tokenized(smollm2, question) for question in questions]))
    for number, expected in enumerate(EXPECTED[task]["answers"]):
        assert [answer.log_likelihood for answer in found[number]] == pytest.approx([e[0] for e in expected], abs=1e-3)
        assert [answer.greedy for answer in found[number]] == [e[1] for e in expected]
    for name, result in tasks.results(tasks.get(task), questions, found).items():
        assert result.value == pytest.approx(EXPECTED[task]["results"][name], rel=1e-3)
        if name != "perplexity":  # whose error the harness draws at random
            assert result.error == pytest.approx(EXPECTED[task]["results"][f"{name}_stderr"], rel=1e-6)
