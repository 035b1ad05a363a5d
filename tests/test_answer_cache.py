"""Answers that were made before come again: the same pieces, with nothing evaluated, for the same question alone."""

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
from types import MappingProxyType

import pytest
from conftest import BUNDLED
from serving import Server

from edgellm.answer_cache import AnswerCache
from edgellm.api import Model
from edgellm.errors import ArgumentError

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = "Once upon a time"


@pytest.fixture
def cache():
    with AnswerCache() as opened:
        yield opened


@pytest.fixture
def model(cache):
    with Model(BUNDLED, backend="reference", answer_cache=cache) as loaded:
        yield loaded


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.db"


def said(path, **options):
    """(text, from_cache) of a new start of the model, with a cache in that file."""
    with AnswerCache(path) as cache, Model(BUNDLED, backend="reference", answer_cache=cache) as model:
        done = model.generate(PROMPT, **GREEDY, **options)
    return done.text, done.from_cache


def nothing_is_evaluated(model, monkeypatch):
    monkeypatch.setattr(model._backend, "run", None)
    monkeypatch.setattr(model._backend, "best", None)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_tokens": 12},
        {"temperature": 1.5, "seed": 3, "max_tokens": 12},
        {"temperature": 0, "stop": [" girl"]},
        {"temperature": 0, "stop": " girl named"},
        {"temperature": 0, "max_tokens": 20, "banned_strings": ["little girl"], "speculate": 4},
        {"temperature": 0},  # as long as the context
        {"temperature": 0, "max_tokens": 0},
        {"regex": "[a-z]{3}", "seed": 1},
    ],
    ids=str,
)
def test_the_same_pieces_with_nothing_evaluated(model, monkeypatch, options):
    def stream():
        with model.stream(PROMPT, **options) as pieces:
            return list(pieces), pieces.completion

    first, made = stream()
    nothing_is_evaluated(model, monkeypatch)
    again, known = stream()
    assert again == first
    for name in ("text", "ids", "prompt_ids", "finish_reason"):
        assert getattr(known, name) == getattr(made, name)
    assert (made.from_cache, known.from_cache) == (False, True)
    assert known.timings.cached_tokens == known.timings.prompt_tokens == made.timings.prompt_tokens
    assert known.timings.generated_tokens == made.timings.generated_tokens
    assert known.timings.generated_per_second == known.timings.prompt_per_second == 0


def test_an_answer_that_the_model_ends(smollm2_path, cache, monkeypatch):
    """In a chat: the conversation goes on after it as ever."""
    with Model(smollm2_path, answer_cache=cache) as model:
        first, second = (model.chat("You are a helpful assistant. Answer in one short sentence.") for _ in "ab")
        made = first.send("What is the capital of France?", **GREEDY)
        assert (made.finish_reason, made.from_cache) == ("stop", False)
        assert "Paris" in made.text
        with monkeypatch.context() as patched:
            nothing_is_evaluated(model, patched)
            known = second.send("What is the capital of France?", **GREEDY)
        assert (known.text, known.ids, known.finish_reason, known.from_cache) == (made.text, made.ids, "stop", True)
        assert known.timings.generated_tokens == made.timings.generated_tokens == len(made.ids) + 1
        assert second.messages == first.messages
        after, again = (chat.send("And of Italy?", temperature=0, max_tokens=20) for chat in (first, second))
        assert after.ids == again.ids
        assert (after.from_cache, again.from_cache) == (False, True)


def test_another_question_gets_its_own_answer(model, cache):
    def asked(prompt=PROMPT, **options):
        return model.generate(prompt, **{**GREEDY, **options}).from_cache

    assert not asked()
    assert asked()
    for options in (
        {"prompt": "Once upon a"}, {"max_tokens": 13}, {"stop": "x"}, {"ignore_eos": True}, {"banned_strings": "x"},
        {"seed": 1}, {"repeat_penalty": 1.1}, {"logit_bias": {9: 1.0}}, {"top_k": 3}, {"choices": ["a", "b"]},
        {"json_schema": {"enum": [1]}}, {"json_schema": {"enum": [2]}}, {"grammar": 'root ::= "a"'},
    ):  # fmt: skip
        assert not asked(**options), options
        assert asked(**options), options
    assert asked(json_schema=MappingProxyType({"enum": [1]}))
    assert asked(speculate=3)
    cache.clear()
    assert (len(cache), asked()) == (0, False)


def test_what_is_left_to_chance_or_asks_for_more_is_made_anew(model, cache):
    for options in (
        {"temperature": 0.8}, {"temperature": 0, "dynatemp_range": 0.5}, {"temperature": 0, "xtc_probability": 0.5},
        {"temperature": 0, "logprobs": 1}, {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 0, "logits_processors": [lambda ids, logits: logits]},
    ):  # fmt: skip
        assert not any(model.generate(PROMPT, max_tokens=2, **options).from_cache for _ in range(2))
    assert len(cache) == 0


def test_an_answer_that_is_stopped_early_is_not_kept(model, cache):
    with model.stream(PROMPT, **GREEDY) as stream:
        next(stream)
    assert len(cache) == 0
    assert model.generate(PROMPT, **GREEDY).finish_reason == "length"


def test_batches_and_event_loops(model, monkeypatch):
    """Each way of asking finds what another one made."""
    one, two, three = (model.generate(PROMPT, **GREEDY, seed=seed).ids for seed in (1, 2, 3))
    expected = [model.generate("The dog", **GREEDY).ids, one]
    batch = model.generate_batch(["The dog", PROMPT], **GREEDY, seed=1)
    assert [done.ids for done in batch] == expected
    assert [done.from_cache for done in batch] == [False, True]
    many = model.generate_many(PROMPT, 3, **GREEDY, seed=1)
    assert [(done.ids, done.from_cache) for done in many] == [(one, True), (two, True), (three, True)]

    async def ask(prompt):
        async with model.astream(prompt, **GREEDY, seed=1) as stream:
            text = "".join([piece.text async for piece in stream])
        assert text == stream.completion.text
        return stream.completion

    async def main():
        return await asyncio.gather(ask(PROMPT), ask("A cat"), ask("The dog"))

    assert [done.from_cache for done in asyncio.run(main())] == [True, False, True]
    nothing_is_evaluated(model, monkeypatch)
    assert [done.from_cache for done in asyncio.run(main())] == [True, True, True]


def test_a_file_is_for_the_next_start_and_for_the_same_model(path, smollm2_path):
    text, from_cache = said(path)
    assert (text.startswith(", there was a little"), from_cache) == (True, False)
    assert said(path) == (text, True)
    for changes in ({"context_length": 64}, {"backend": "cpu"}):
        options = {"backend": "reference", **changes}
        with AnswerCache(path) as cache, Model(BUNDLED, answer_cache=cache, **options) as other:
            assert not other.generate(PROMPT, **GREEDY).from_cache
    with AnswerCache(path) as cache, Model(smollm2_path, answer_cache=cache) as other:
        assert not other.generate(PROMPT, **GREEDY).from_cache


def test_a_server_answers_from_a_file_after_a_restart(path):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    said = []
    for _ in range(2):
        with Server(BUNDLED, "--answer-cache", path) as server:
            answers = [server.post("/v1/completions", body)[1] for _ in range(2)]
            streamed = server.post("/v1/completions", {**body, "stream": True})[1]
        texts = [
            json.loads(line)["choices"][0]["text"] for line in re.findall(r"^data: (\{.*)", streamed, re.MULTILINE)
        ]
        said += [answer["choices"][0]["text"] for answer in answers] + ["".join(texts)]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert cached == ([0, 5] if len(said) == 3 else [5, 5])
    assert said == [", there was a little girl named Lily. She"] * 6


def test_what_was_not_asked_for_the_longest_goes_first(path):
    with AnswerCache(path, most_bytes=100_000) as cache:
        for i in range(500):
            cache.put({"i": i}, range(100), "stop")
            assert cache.get({"i": 0}) == (list(range(100)), "stop")
            assert cache.get({"i": i})
        assert 50 < len(cache) < 250
        assert cache.get({"i": 1}) is None
    assert path.stat().st_size < 110_000


def damage(path, count):
    """Other bytes in the middle of a file."""
    raw = bytearray(path.read_bytes())
    at = len(raw) // 2
    raw[at : at + count] = bytes(b ^ 0x55 for b in raw[at : at + count])
    path.write_bytes(raw)


def many(path):
    with AnswerCache(path) as cache:
        for i in range(1000):
            cache.put({"i": i}, [i] * 50, "stop")


def found(path):
    with AnswerCache(path) as cache:
        return [cache.get({"i": i}) for i in range(1000)]


def test_a_damaged_file_is_put_aside_and_made_anew(path):
    many(path)
    damage(path, 8192)
    with pytest.warns(RuntimeWarning, match=r"answers\.db is damaged .* made anew"):
        assert {str(answer) for answer in found(path)} <= {"None", *(str(([i] * 50, "stop")) for i in range(1000))}
    with AnswerCache(path) as cache:
        cache.put({"i": "new"}, [1], "stop")
        assert cache.get({"i": "new"}) == ([1], "stop")
    assert len(list(path.parent.glob("answers.db.damaged-*"))) == 1


def test_a_file_that_is_cut_is_put_aside(path):
    many(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.warns(RuntimeWarning, match="put aside"):
        assert set(found(path)) == {None}
    path.write_bytes(b"")
    assert said(path)[1] is False
    assert said(path)[1] is True


def test_one_wrong_bit_in_an_answer_is_found(path):
    with AnswerCache(path) as cache:
        cache.put({}, [7] * 50, "stop")
    raw = path.read_bytes()
    at = raw.index(b"\7\0\0\0" * 50)
    path.write_bytes(raw[:at] + b"\6" + raw[at + 1 :])
    with pytest.warns(RuntimeWarning, match="does not match its checksum"), AnswerCache(path) as cache:
        assert cache.get({}) is None


def test_files_that_are_something_else_are_left_alone(path, tmp_path):
    path.write_text("My notes")
    with pytest.raises(ArgumentError, match=r"answers\.db is no answer cache; expected a file that edgellm wrote"):
        AnswerCache(path)
    assert path.read_text() == "My notes"
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(ArgumentError, match="the database of another program"):
        AnswerCache(tmp_path / "other.db")
    with pytest.raises(ArgumentError, match="cannot be opened as an answer cache"):
        AnswerCache(tmp_path)
    with pytest.raises(ArgumentError, match="cannot be opened as an answer cache"):
        AnswerCache(tmp_path / "nowhere" / "answers.db")
    with pytest.raises(ArgumentError, match="most_bytes is 5; expected 65536 or more"):
        AnswerCache(most_bytes=5)


def test_a_file_that_another_process_holds_is_done_without(path, monkeypatch):
    monkeypatch.setattr("edgellm.answer_cache.WAIT", 0.01)
    with AnswerCache(path) as cache:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.warns(RuntimeWarning, match=r"did not work: .*locked; the answer is made without it"):
            cache.put({}, [1], "stop")
        other.execute("ROLLBACK")
        other.close()
        assert cache.get({}) is None
        cache.put({}, [1], "stop")
        assert cache.get({}) == ([1], "stop")
    assert cache.get({}) is None


def test_several_processes_share_a_file(path):
    code = f"""
from edgellm.answer_cache import AnswerCache
with AnswerCache({str(path)!r}) as cache:
    for i in range(200):
        cache.put({{"i": i}}, [i, i], "length")
        assert cache.get({{"i": i}}) == ([i, i], "length")
"""
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    with AnswerCache(path) as cache:
        assert len(cache) == 200
