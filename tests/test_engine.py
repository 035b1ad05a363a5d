"""Answers of several threads and event loops at once: right, cancelled at any token, and nothing is left of them."""

import gc
import queue
import threading
import time

import pytest
from conftest import BUNDLED
from serving import until

from edgellm.answer import Completion, Piece
from edgellm.api import Model
from edgellm.errors import ArgumentError, EdgeError

PROMPTS = ["Once upon a time", "One day", "Tom", "Lily saw a", "The dog", "A big", "There was", "She"]
OPTIONS = {"max_tokens": 60, "temperature": 0.8, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request):
    return request.param


@pytest.fixture
def model(backend):
    with Model(BUNDLED, backend=backend) as loaded:
        yield loaded


def submit(model, prompt, **options):
    events = queue.SimpleQueue()
    return model.submit_ids(model.tokenize(prompt), events.put, **options), events


def told(events):
    """All events of an answer."""
    found = [events.get(timeout=60)]
    while isinstance(found[-1], Piece):
        found.append(events.get(timeout=60))
    return found


def engines():
    return [thread for thread in threading.enumerate() if thread.name == "edgellm-engine"]


def test_answers_are_as_they_would_be_alone(model):
    made = [submit(model, prompt, **OPTIONS) for prompt in PROMPTS]
    for prompt, (job, events) in zip(PROMPTS, made, strict=True):
        *pieces, done = told(events)
        with model.stream(prompt, **OPTIONS) as stream:
            assert pieces == list(stream)
        assert (done.ids, done.text, done.finish_reason) == (
            stream.completion.ids, stream.completion.text, "length"
        )  # fmt: skip
        assert done is job.answer.completion


def test_what_comes_next_is_evaluated_when_there_is_nothing_else_to_do(model):
    """And an error in it is none of anybody's business."""

    def missing():
        raise KeyError("plugh")

    ids = model.tokenize("Once upon a time there was a dog")
    for opening in (missing, lambda: ids):
        _, events = submit(model, "Tom", **OPTIONS)
        told(events)
        model.when_idle(opening)
        until(lambda: model._engine._later is None)
    until(lambda: model.prefix_cache.known([*ids, 0]) == len(ids))
    job, events = submit(model, "Once upon a time there was a dog", **OPTIONS)
    told(events)
    assert job.answer.completion.timings.cached_tokens == len(ids) - 1


def test_some_are_cancelled_and_the_others_go_on(model):
    made = [submit(model, prompt, **OPTIONS) for prompt in PROMPTS]
    heard = [[events.get(timeout=60) for _ in range(5)] for _, events in made]
    for job, _ in made[::2]:
        job.cancel()
        job.cancel()
    for i, (job, events) in enumerate(made):
        *pieces, done = heard[i] + told(events)
        expected = model.generate(PROMPTS[i], **OPTIONS)
        assert done.finish_reason == ("length" if i % 2 else "cancelled")
        assert done.ids == expected.ids[: len(done.ids)]
        assert done.text == "".join(piece.text for piece in pieces)
        assert 5 <= len(done.ids) <= 60
        assert events.empty()
        job.cancel()
        assert events.empty()
    assert not model._engine._under_way


def test_one_can_be_cancelled_before_it_has_begun(model):
    job, events = submit(model, "Tom", **OPTIONS)
    job.cancel()
    *_, done = told(events)
    assert done.finish_reason == "cancelled"
    other = told(submit(model, "Tom", **OPTIONS)[1])
    assert other[-1].ids == model.generate("Tom", **OPTIONS).ids


def test_its_thread_begins_with_the_first_answer_and_ends_with_the_model(backend):
    before = set(threading.enumerate())
    with Model(BUNDLED, backend=backend) as model:
        model.generate("Tom", max_tokens=2)
        assert not engines()
        events = [submit(model, "Tom", max_tokens=2)[1] for _ in range(3)]
        assert [told(each)[-1].finish_reason for each in events] == ["length"] * 3
        assert len(engines()) == 1
        waiting = submit(model, "Tom", max_tokens=500, ignore_eos=True)[1]
    assert not set(threading.enumerate()) - before
    *_, last = told(waiting)
    assert isinstance(last, EdgeError)
    assert "closed before the answer was complete" in str(last)
    with pytest.raises(EdgeError, match="is closed"):
        submit(model, "Tom")


def test_a_model_that_is_forgotten_takes_its_thread_along(backend):
    model = Model(BUNDLED, backend=backend)
    told(submit(model, "Tom", max_tokens=2)[1])
    del model
    gc.collect()
    assert not engines()


def test_idle_it_keeps_the_memory_of_one_slot(model):
    told(submit(model, "Tom", max_tokens=1)[1])
    slots = model._backend._backend._slots
    for events in [submit(model, prompt, **OPTIONS)[1] for prompt in PROMPTS]:
        told(events)
    deadline = time.monotonic() + 60
    while len(slots) > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(slots) == 1
    again = told(submit(model, PROMPTS[0], **OPTIONS)[1])[-1]
    assert again.ids == model.generate(PROMPTS[0], **OPTIONS).ids


def test_errors_are_told_and_others_go_on(model):
    def broken(ids, logits):
        if len(ids) > 20:
            raise ZeroDivisionError("mine")
        return logits

    good, bad = submit(model, "Tom", **OPTIONS)[1], submit(model, "Tom", logits_processors=[broken], **OPTIONS)[1]
    *pieces, error = told(bad)
    assert pieces
    assert isinstance(error, ZeroDivisionError)
    assert told(good)[-1].ids == model.generate("Tom", **OPTIONS).ids
    with pytest.raises(ArgumentError, match="max_tokens is -1"):
        submit(model, "Tom", max_tokens=-1)


def test_a_backend_that_fails_ends_all_that_are_under_way_and_no_later_ones(model, monkeypatch):
    def fail(step):
        raise MemoryError("no more")

    monkeypatch.setattr(model._backend, "run", fail)
    events = [submit(model, prompt, **OPTIONS)[1] for prompt in PROMPTS]
    assert {type(told(each)[-1]) for each in events} == {MemoryError}
    monkeypatch.undo()
    assert told(submit(model, "Tom", **OPTIONS)[1])[-1].ids == model.generate("Tom", **OPTIONS).ids


def test_one_that_cannot_begin_anew_tells_those_who_wait_and_begins_with_the_next(model, monkeypatch):
    def fails(self, *arguments):
        raise RuntimeError("plugh")

    with monkeypatch.context() as broken:
        broken.setattr(model._backend, "best", fails)
        broken.setattr(model._backend, "run", fails)
        broken.setattr("edgellm.scheduler.Scheduler.close", fails)
        _, events = submit(model, "Once", **OPTIONS)
        assert str(told(events)[-1]) == "plugh"
        until(lambda: not engines())
    _, events = submit(model, "Once", **OPTIONS)
    assert isinstance(told(events)[-1], Completion)


def test_where_no_thread_can_be_started_nothing_waits_for_it(model, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(2):
        with pytest.raises(EdgeError, match="no thread can be started to make the answer: can't start new thread"):
            submit(model, "Tom", **OPTIONS)
    monkeypatch.undo()
    assert told(submit(model, "Tom", **OPTIONS)[1])[-1].ids == model.generate("Tom", **OPTIONS).ids
    assert not model._engine._coming


def test_one_to_whom_nobody_listens_is_cancelled(model):
    heard = []

    def listen(event):
        heard.append(event)
        raise RuntimeError("the loop is closed")

    job = model.submit_ids(model.tokenize("Tom"), listen, **OPTIONS)
    assert told(submit(model, "Lily", **OPTIONS)[1])[-1].ids == model.generate("Lily", **OPTIONS).ids
    assert [type(event) for event in heard] == [Piece, Completion]
    assert job.answer.completion.finish_reason == "cancelled"


def test_a_stop_string_ends_an_answer(model):
    options = {**OPTIONS, "temperature": 0, "stop": ["Lily"]}
    *pieces, done = told(submit(model, "Once upon a time", **options)[1])
    with model.stream("Once upon a time", **options) as stream:
        assert pieces == list(stream)
    assert (done.text, done.finish_reason) == (stream.completion.text, "stop")
