"""What becomes of a model's words: thoughts, text and calls, however they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.answer import Completion, Piece, Timings
from edgellm.chat import Question
from edgellm.server.endpoints.chat_completions import _message
from edgellm.server.messages import messages_of
from edgellm.server.turn import Asked, Prompt, Reader, whole, written
from edgellm.tools import STYLES

CALL = '<tool_call>{"name": "clock", "arguments": {"zone": "é"}}</tool_call>'
ANSWERS = [
    ("Paris.", False, False, "Paris.", None, []),
    ("<think>Where?</think>Paris.", False, False, "Paris.", "Where?", []),
    ("Where?</think>Paris.", True, False, "Paris.", "Where?", []),
    ("Where", True, False, "", "Where", []),
    ("1 < 2 <thi", False, False, "1 < 2 <thi", None, []),
    (CALL, False, False, CALL, None, []),
    (CALL, False, True, None, None, [("clock", '{"zone": "é"}')]),
    ("When?</think>I look." + CALL, True, True, "I look.", "When?", [("clock", '{"zone": "é"}')]),
    ("<think>" + CALL + "</think>No.", False, True, "No.", CALL, []),
    ("Well <tool_call>no", False, True, "Well <tool_call>no", None, []),
]


@pytest.mark.parametrize(("said", "is_thinking", "has_tools", "content", "reasoning", "calls"), ANSWERS)
@given(data=st.data())
def test_thoughts_text_and_calls(said, is_thinking, has_tools, content, reasoning, calls, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(said)), max_size=8)))
    reader = Reader(Asked(Prompt(Question([1], STYLES["hermes"] if has_tools else None), is_thinking), []))
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, len(said)], strict=True):
        parts += reader.push(Piece(said[begin:end], 0))
    end = reader.finish(Completion(said, [], "stop", [1], Timings()))
    message = _message(whole([*parts, *end.parts], end))
    assert message["content"] == content
    assert message.get("reasoning_content") == reasoning
    found = [each["function"] for each in message.get("tool_calls", ())]
    assert [(each["name"], each["arguments"]) for each in found] == calls
    assert end.reason == ("tool_calls" if calls else "stop")


BEGUN = [
    ("", "Par", False, "Par"),
    ("", "Par", True, "</think>Par"),
    ("", "", True, ""),
    ("Wh", "", False, "<think>Wh"),
    ("Wh", "", True, "Wh"),
    ("Where?", "Par", False, "<think>Where?</think>Par"),
    ("Where?", "Par", True, "Where?</think>Par"),
]


@pytest.mark.parametrize(("thought", "content", "is_thinking", "expected"), BEGUN)
def test_the_beginning_of_an_answer_as_the_model_wrote_it(thought, content, is_thinking, expected):
    begun = {"content": content, **({"reasoning_content": thought} if thought else {})}
    assert written(begun, is_thinking) == expected


def test_messages_as_templates_want_them():
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    given_ = [
        {"role": "developer", "content": "Be terse."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": "2"},
    ]
    assert messages_of(given_) == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "123456789"}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "123456789"},
    ]
