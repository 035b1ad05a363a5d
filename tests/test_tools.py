"""Tool calls: read in the styles of five families however they are cut, told by templates, forced by schemas."""

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.api import Model
from edgellm.chat_template import ChatTemplate
from edgellm.errors import ArgumentError
from edgellm.tools import STYLES, CallReader, ToolCall, checked_tools, chosen_schema, style_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Rome"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
PARIS, ROME = ToolCall("get_weather", {"city": "Paris"}), ToolCall("get_weather", {"city": "Rome", "days": 2})

ANSWERS = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}</tool_call>',
        "I look.\n",
        [PARIS, ROME],
    ),
    ("hermes", '<tool_call>[{"name": "clock", "arguments": {}}]</tool_call>', "", [ToolCall("clock", {})]),  # SmolLM's
    ("hermes", '<tool_call>{"name": "clock"}', "", [ToolCall("clock", {})]),
    ("hermes", "1 < 2 and <tool", "1 < 2 and <tool", []),
    ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ("hermes", '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}]', "", [PARIS]),
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        "llama3",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_weather", "parameters": {"city": "Rome", "days": 2}}',
        "",
        [PARIS, ROME],
    ),
    ("llama3", "It is {sunny}.", "It is {sunny}.", []),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("gemma", '```tool_code\nget_weather(city="Paris")\n```', "", [PARIS]),
    ("gemma", 'Well:\n```tool_code\n[get_weather(city="Rome", days=2)]\n```', "Well:\n", [ROME]),
    ("gemma", '```tool_code\nprint(get_weather(city="Paris"))\n```', "", [PARIS]),
    ("gemma", '```json\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```', "", [PARIS]),
    ("gemma", "```tool_code\nimport os\n```", "```tool_code\nimport os\n```", []),
    ("gemma", "```tool_code\nf(x=g())\n```", "```tool_code\nf(x=g())\n```", []),
    ("gemma", "```python\nprint()\n```", "```python\nprint()\n```", []),
]


@pytest.mark.parametrize(("style", "answer", "text", "calls"), ANSWERS)
@given(data=st.data())
def test_calls_are_read_however_an_answer_is_cut(style, answer, text, calls, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=8)))
    reader, shown = CallReader(STYLES[style]), ""
    for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        shown += reader.push(answer[begin:end])
        assert text.startswith(shown)
    rest, found = reader.finish()
    assert (shown + rest, found) == (text, calls)


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ tools }}<tool_call>", "hermes"),
        ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama3"),
        ("```tool_code", "gemma"),
        ("<|im_start|>", "hermes"),
    ],
)
def test_the_template_tells_the_style(template, style):
    assert style_of(template) is STYLES[style]


def test_templates_get_the_tools():
    template = ChatTemplate("{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}.")
    assert template.render([]) == "."
    assert json.loads(template.render([], tools=[WEATHER])[:-1]) == WEATHER


@pytest.mark.parametrize("tools", [[{}], ["f"], [{"function": {"name": ""}}], [CLOCK, CLOCK], [{"function": "f"}]])
def test_wrong_tools_are_an_error(tools):
    with pytest.raises(ArgumentError, match="is no tool"):
        checked_tools(tools)


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ArgumentError, match="tool_choice is 'f'; expected auto, none, required, or one of clock"):
        chosen_schema(checked_tools([CLOCK]), "f", STYLES["hermes"])


@pytest.fixture(scope="module")
def compiled(smollm2_path):
    with Model(smollm2_path) as model:
        yield model


@pytest.mark.parametrize("choice", ["required", "get_weather"])
@pytest.mark.parametrize("style", STYLES)
def test_a_forced_call_of_smollm2_is_valid(compiled, monkeypatch, style, choice):
    monkeypatch.setattr("edgellm.tools.style_of", lambda template: STYLES[style])
    for seed in range(1, 9):  # the schemas allow more properties than they name, and some answers find no end
        chat = compiled.chat()
        options = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": 100, "seed": seed}
        answer = chat.send("How is the weather in Rome?", **options)
        if answer.finish_reason != "length":
            break
    assert (answer.finish_reason, answer.text) == ("tool_calls", "")
    (call,) = answer.tool_calls
    schemas = checked_tools([WEATHER, CLOCK])
    assert call.name in ([choice] if choice == "get_weather" else schemas)
    jsonschema.validate(call.arguments, schemas[call.name])
    again = chat.send("Sunny, 20 degrees.", role="tool", max_tokens=20, seed=1)
    assert again.tool_calls == []
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]


def test_smollm2_is_told_of_tools_and_shows_no_calls(compiled):
    """Its template has no place for them, so the system message has."""
    chat = compiled.chat(system="You are terse.")
    with chat.stream("Weather in Paris?", tools=[WEATHER], max_tokens=60, temperature=0) as stream:
        shown = "".join(piece.text for piece in stream)
    answer = stream.completion
    prompt = compiled.tokenizer.decode(answer.prompt_ids, skip_special=False)
    assert "You are terse.\n\nYou can call functions." in prompt
    assert '"name": "get_weather"' in prompt
    assert shown == answer.text
    assert chat.messages[0]["content"] == "You are terse."


def test_no_tools_are_told_with_the_choice_none(compiled):
    answer = compiled.chat().send("Hello", tools=[WEATHER], tool_choice="none", max_tokens=5)
    assert "get_weather" not in compiled.tokenizer.decode(answer.prompt_ids)


def test_wrong_options(compiled):
    chat = compiled.chat()
    with pytest.raises(ArgumentError, match="the role is 'robot'"):
        chat.send("Hello", role="robot")
    with pytest.raises(ArgumentError, match="grammar and tool_choice"):
        chat.send("Hello", tools=[CLOCK], tool_choice="required", grammar='root ::= "a"')
    with pytest.raises(ArgumentError, match="both given"):
        chat.send("Hello", tools=[CLOCK], tool_choice="required", regex="a")
    assert chat.messages == []


def test_a_template_with_a_place_for_tools(compiled, monkeypatch):
    source = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{% for call in message.tool_calls or [] %}"
        "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    monkeypatch.setattr("edgellm.chat.chat_template", lambda model: ChatTemplate(source))
    chat = compiled.chat()
    answer = chat.send("Weather in Rome?", tools=[WEATHER], tool_choice="required", max_tokens=60, seed=1)
    assert "You can call functions" not in compiled.tokenizer.decode(answer.prompt_ids)
    call = chat.messages[-1]["tool_calls"][0]["function"]
    assert call == {"name": "get_weather", "arguments": answer.tool_calls[0].arguments}
    told = chat.send("Rain.", role="tool", tools=[WEATHER], max_tokens=5).prompt_ids
    assert '<tool_call>\n{"name": "get_weather"' in compiled.tokenizer.decode(told)
