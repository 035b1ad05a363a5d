"""Answers in an event loop: the same as without one, in shared steps, stopped at any token; and nothing is left."""

import asyncio
import gc
import threading
import time

import pytest
from conftest import BUNDLED

from edgellm.answer import Answer
from edgellm.api import Model
from edgellm.chat_template import ChatTemplate
from edgellm.engine import Job
from edgellm.errors import ArgumentError, ContextOverflowError, EdgeError
from edgellm.generate import Slot

PROMPTS = ["Once upon a time", "One day", "Tom", "Lily saw a", "The dog", "A big", "There was", "She"]
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
OPTIONS = {"max_tokens": 80, "temperature": 0.8, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request):
    return request.param


@pytest.fixture
def model(backend):
    with Model(BUNDLED, backend=backend) as loaded:
        yield loaded


def alive(kind):
    gc.collect()
    return sum(isinstance(each, kind) for each in gc.get_objects())


async def settled(check):
    """Wait for the engine, which lets go of things after it has told of them."""
    deadline = time.monotonic() + 60
    while not check() and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert check()


async def after(stream, n):
    """The first n pieces."""
    return [await anext(stream) for _ in range(n)]


def gated(model, monkeypatch):
    """Steps need permits from now on."""
    permits, run = threading.Semaphore(0), model._backend.run
    monkeypatch.setattr(model._backend, "run", lambda step: permits.acquire() and run(step))
    return permits


def test_eight_at_once_of_which_four_are_stopped(model, monkeypatch):
    """By cancelling a task, by a timeout, by closing, and by break: while a step is under way."""
    threads = set(threading.enumerate())
    expected = [model.generate(prompt, **OPTIONS) for prompt in PROMPTS]
    permits = gated(model, monkeypatch)

    async def main():
        streams = [model.astream(prompt, **OPTIONS) for prompt in PROMPTS]
        made = [asyncio.ensure_future(after(stream, 10)) for stream in streams]
        permits.release(30)
        begun = await asyncio.gather(*made)
        completions = [stream.completion for stream in streams]

        task = asyncio.ensure_future(after(streams[0], 1000))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(after(streams[1], 1000), 0.01)
        async with streams[2]:
            pass
        for stream in streams[:3]:
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        del stream, streams[:3]
        async for _ in streams.pop(0):
            break

        said = [list(done.ids) for done in completions[:4]]
        permits.release(10_000)
        rest = await asyncio.gather(*(after(stream, 71) for stream in streams))
        assert [done.ids for done in completions[:4]] == said
        return completions, ["".join(piece.text for piece in a + b) for a, b in zip(begun[4:], rest, strict=True)]

    completions, texts = asyncio.run(main())
    for done, whole in zip(completions[:4], expected[:4], strict=True):
        assert 10 <= len(done.ids) <= 30
        assert done.ids == whole.ids[: len(done.ids)]
        assert done.finish_reason == "cancelled"
        assert whole.text.startswith(done.text)
    assert [(done.ids, done.text, done.finish_reason) for done in completions[4:]] == [
        (whole.ids, whole.text, "length") for whole in expected[4:]
    ]
    assert texts == [whole.text for whole in expected[4:]]
    assert {thread.name for thread in set(threading.enumerate()) - threads} == {"edgellm-engine"}


def test_nothing_is_left_of_them(backend):
    threads, slots = set(threading.enumerate()), alive(Slot)

    async def some(model):
        streams = [model.astream(prompt, **OPTIONS) for prompt in PROMPTS]
        tasks = [asyncio.ensure_future(after(stream, 81 if i % 2 else 20)) for i, stream in enumerate(streams)]
        await asyncio.gather(*tasks)
        del streams, tasks
        await settled(lambda: not alive(Job) and not alive(Answer) and alive(Slot) == slots + 1)

    with Model(BUNDLED, backend=backend) as model:
        asyncio.run(some(model))
        asyncio.run(some(model))
    assert set(threading.enumerate()) == threads
    del model
    assert alive(Slot) == slots


def test_they_share_steps(model, monkeypatch):
    rows, run = [], model._backend.run
    monkeypatch.setattr(model._backend, "run", lambda step: rows.append(len(step.tokens)) or run(step))

    async def main():
        return await asyncio.gather(*(model.agenerate(prompt, **OPTIONS) for prompt in PROMPTS))

    made = asyncio.run(main())
    assert [each.finish_reason for each in made] == ["length"] * 8
    assert len(rows) < 3 * 80


def test_the_loop_goes_on_while_the_model_computes(model, monkeypatch):
    """A step that waits for the loop: it would wait for ever if the loop waited for it."""
    allowed, run = threading.Event(), model._backend.best
    monkeypatch.setattr(model._backend, "best", lambda step: allowed.wait(60) and run(step))

    async def main():
        stream = model.astream("Tom", max_tokens=5, temperature=0)
        first = asyncio.ensure_future(anext(stream))
        await settled(lambda: stream.completion.prompt_ids)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not first.done()
        await stream.aclose()  # nor does that wait for a step
        assert not allowed.is_set()
        first.cancel()
        allowed.set()
        return await model.agenerate("Tom", max_tokens=5, temperature=0)

    done = asyncio.run(main())
    monkeypatch.undo()
    assert done.ids == model.generate("Tom", max_tokens=5, temperature=0).ids


def test_errors_come_with_the_first_piece(model):
    async def first(prompt, **options):
        return await anext(model.astream(prompt, **options))

    with pytest.raises(ContextOverflowError, match="do not fit"):
        asyncio.run(first("Tom", max_tokens=10**6))
    with pytest.raises(ArgumentError, match="speculate is -1"):
        asyncio.run(first("Tom", speculate=-1))
    with pytest.raises(TypeError, match="unknown or mistyped"):
        asyncio.run(first("Tom", temprature=1))

    def broken(ids, logits):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        asyncio.run(model.agenerate("Tom", logits_processors=[broken]))


def test_a_model_that_is_closed_meanwhile(backend):
    model = Model(BUNDLED, backend=backend)

    async def main():
        stream = model.astream("Tom", **OPTIONS)
        await anext(stream)
        model.close()
        with pytest.raises(EdgeError, match="closed before the answer was complete"):
            await after(stream, 100)
        with pytest.raises(EdgeError, match="is closed"):
            await model.agenerate("Tom")

    asyncio.run(main())


def test_a_model_lives_as_long_as_its_streams(backend):
    async def main():
        return [piece.id async for piece in Model(BUNDLED, backend=backend).astream("Tom", **OPTIONS)]

    ids = asyncio.run(main())
    assert len(ids) == 81
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "edgellm-engine"]


def test_a_loop_that_ends_early_stops_its_answers(model):
    kept = []

    async def main():
        kept.append(model.astream("Tom", **OPTIONS))
        await after(kept[0], 3)

    asyncio.run(main())
    assert asyncio.run(model.agenerate("Lily", **OPTIONS)).ids == model.generate("Lily", **OPTIONS).ids
    assert not model._engine._under_way


@pytest.fixture
def told(model, monkeypatch):
    """The model with a chat template."""
    source = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    monkeypatch.setattr("edgellm.chat.chat_template", lambda model: ChatTemplate(source))
    return model


def test_chats_are_the_same(told):
    chats, options = [told.chat("Be kind.") for _ in range(3)], {"max_tokens": 30, "seed": 3}
    expected = [chats[0].send(text, **options) for text in ("Once", "And then")]

    async def main(chat):
        return [await chat.asend(text, **options) for text in ("Once", "And then")]

    async def both():
        return await asyncio.gather(*(main(chat) for chat in chats[1:]))

    for chat, made in zip(chats[1:], asyncio.run(both()), strict=True):
        assert [each.ids for each in made] == [each.ids for each in expected]
        assert chat.messages == chats[0].messages
    assert [message["role"] for message in chats[1].messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_chat_keeps_what_was_said_before_it_was_stopped(told):
    chat = told.chat()

    async def main():
        async for _ in (stream := chat.astream("Once", **OPTIONS)):
            if len(stream.completion.ids) >= 3:
                break
        answer = stream.completion
        del stream
        return answer

    answer = asyncio.run(main())
    assert chat.messages[1] == {"role": "assistant", "content": answer.text}
    with pytest.raises(ArgumentError, match="the role is 'robot'"):
        asyncio.run(chat.asend("Once", role="robot"))
    assert len(chat.messages) == 2


def test_a_chat_with_tools(told):
    tool = {"type": "function", "function": {"name": "now", "parameters": NOTHING}}
    options = {"tools": [tool], "tool_choice": "required", "max_tokens": 200, "seed": 1}
    chats = [told.chat(), told.chat()]
    expected, made = chats[0].send("Once", **options), asyncio.run(chats[1].asend("Once", **options))
    assert made.finish_reason == "tool_calls"
    assert (made.ids, made.tool_calls) == (expected.ids, expected.tool_calls)
    assert chats[1].messages == chats[0].messages
