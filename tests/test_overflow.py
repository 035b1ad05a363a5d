"""Prompts that do not fit: what is left of them is what is told, and the answer is the one to that."""

import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import BUNDLED
from test_repl import Shown, typed

from edgellm.api import Model
from edgellm.errors import ArgumentError, ContextOverflowError
from edgellm.overflow import fits, most_left, without_oldest
from edgellm.repl import Repl

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
CONTEXT = 100
GREEDY = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
LONG = "Once upon a time there was a little girl named Lily. She liked to play in the park. " * 6


@pytest.fixture(scope="module", params=["cpu", "reference"])
def model(request):
    with Model(BUNDLED, backend=request.param, context_length=CONTEXT) as model:
        model.info = replace(model.info, chat_template=TEMPLATE)
        yield model


def test_what_is_left():
    assert [fits(80, 20, 100), fits(81, 20, 100), fits(99, None, 100), fits(100, None, 100), fits(100, 0, 100)] == [
        True, False, True, False, True
    ]  # fmt: skip
    assert [most_left(None, 100), most_left(10, 100), most_left(60, 100)] == [75, 75, 40]
    assert without_oldest([0, 1, 2, 3, 4, 5], 1, 3) == [0, 4, 5]
    assert without_oldest([0, 1, 2, 3, 4, 5], 0, 2) == [4, 5]
    assert without_oldest([0, 1, 2], 1, 1) == [0, 1, 2]


@pytest.mark.parametrize(("max_tokens", "n_left"), [(20, 75), (40, 60), (None, 75)])
def test_the_oldest_tokens_go_but_not_the_first(model, max_tokens, n_left):
    ids, options = model.tokenize(LONG), {**GREEDY, "max_tokens": max_tokens}
    expected = [ids[0], *ids[len(ids) - n_left + 1 :]]
    done = model.generate(LONG, overflow="shift", **options)
    assert done.prompt_ids == expected
    assert done.dropped_tokens == len(ids) - n_left
    assert done.dropped_messages == ()
    with model.stream_ids(expected, **options) as stream:
        assert [piece.id for piece in stream if piece.id is not None] == done.ids
    assert len(done.ids) == (max_tokens or CONTEXT - n_left)
    assert model.generate_batch([LONG, "Once"], overflow="shift", **options)[0].ids == done.ids


def test_what_fits_stays(model):
    done = model.generate("Once upon a time", overflow="shift", **GREEDY)
    assert (done.dropped_tokens, done.ids) == (0, model.generate("Once upon a time", **GREEDY).ids)


def test_errors_have_both_numbers(model):
    with pytest.raises(ContextOverflowError, match=r"\d+ tokens and 20 more do not fit: the context holds 100"):
        model.generate(LONG, **GREEDY)
    with pytest.raises(ContextOverflowError, match="5 tokens and 100 more do not fit: the context holds 100"):
        model.generate("Once upon a time", max_tokens=100, overflow="shift")
    with pytest.raises(ArgumentError, match="overflow is 'slide'; expected error, shift or window"):
        model.generate("Once", overflow="slide")
    with pytest.raises(ArgumentError, match="overflow is 'slide'; expected error, shift or window"):
        model.chat().send("Once", overflow="slide")


def test_the_oldest_turns_go_but_not_the_system_message(model):
    """Each answer is the one of a chat that has had the system message and the later turns alone."""
    chat, n_left_out, options = model.chat("Lily is happy."), [], {**GREEDY, "max_tokens": 4}
    for n in range(20):
        before, text = chat.messages, f"Dog {n}"
        answer = chat.send(text, overflow="shift", **options)
        seen = before[1 + len(answer.dropped_messages) :]
        assert answer.dropped_messages == before[1 : len(before) - len(seen)]
        assert len(answer.prompt_ids) + 4 <= CONTEXT
        assert model.detokenize(answer.prompt_ids) == "\n".join(
            [message["content"] for message in [before[0], *seen]] + [text, ""]
        )
        with model.stream_ids(answer.prompt_ids, **options) as stream:
            assert [piece.id for piece in stream if piece.id is not None] == answer.ids
        n_left_out.append(len(answer.dropped_messages))
    assert len(chat.messages) == 41
    assert n_left_out[0] == 0 < n_left_out[-1]
    assert n_left_out == sorted(n_left_out)
    assert len(set(n_left_out)) < 10, "a quarter of the context is free once turns were left out: the next ones stay"
    assert all(n % 2 == 0 for n in n_left_out)
    with pytest.raises(ContextOverflowError):
        chat.send("And then?", **GREEDY)
    chat.messages = chat.messages[:1]
    assert chat.send("The dog", overflow="shift", **GREEDY).dropped_messages == []


def test_a_conversation_that_was_kept_leaves_out_the_same(model, tmp_path):
    options = {**GREEDY, "overflow": "shift"}
    chat = model.chat("Lily is happy.")
    while not chat.send("The dog said hello", **options).dropped_messages:
        assert len(chat.messages) < 20
    chat.save_cache(tmp_path / "cache")
    other = model.chat()
    other.messages = chat.messages
    other.load_cache(tmp_path / "cache")
    expected, found = (each.send("Hi", **{**options, "max_tokens": 2}) for each in (chat, other))
    assert (found.ids, found.prompt_ids) == (expected.ids, expected.prompt_ids)
    assert found.dropped_messages == expected.dropped_messages != []
    assert found.timings.cached_tokens >= expected.timings.cached_tokens > 20


def test_a_message_that_does_not_fit_is_not_cut(model):
    chat = model.chat("Lily is happy.")
    chat.send("The dog", **GREEDY)
    before = chat.messages
    with pytest.raises(ContextOverflowError, match="do not fit: the context holds 100"):
        chat.send(LONG, overflow="shift", **GREEDY)
    assert chat.messages == before
    assert chat.send("One day", overflow="shift", **GREEDY).dropped_messages == []


def test_the_terminal_tells_once(model):
    repl = Repl(model, model.chat("Lily is happy."), Shown(), {**GREEDY, "overflow": "shift"})
    repl.screen = repl._screen
    notes = typed(repl, *(f"The dog said {n} to a cat" for n in range(5)))
    assert notes[0].startswith("(the context is too short: the model does not see the oldest ")
    assert len(notes) < 4
    assert "expected error, shift or window" in typed(repl, "/set overflow slide", "Hi")[0]


def test_smollm2_keeps_its_system_message(smollm2_path):
    with Model(smollm2_path, backend="cpu", context_length=256) as model:
        chat = model.chat("Your name is Zorba. You answer in one sentence.")
        while not (answer := chat.send("Tell me a long story about a ship.", overflow="shift", max_tokens=48,
                                       temperature=0)).dropped_messages:  # fmt: skip
            assert len(chat.messages) < 20
        assert "Zorba" in model.tokenizer.decode(answer.prompt_ids[:20])
        assert "Zorba" in chat.send("What is your name?", overflow="shift", max_tokens=24, temperature=0).text


def test_the_command_line_tells(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "edgellm", "generate", LONG, "-m", "stories260k", "--ctx", "100", "-n", "5",
         "--overflow", "shift"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "tokens of the prompt were left out ]" in run.stderr
