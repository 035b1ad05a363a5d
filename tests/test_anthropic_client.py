"""Anthropic's own client, unmodified, against a server process on real weights."""

import asyncio
import json

import anthropic
import jsonschema
import pytest
from serving import Server
from test_tools import WEATHER

GREEDY = {"temperature": 0}
"""Newer clients have no argument for it."""
HELLO = [{"role": "user", "content": "Name the capital of France."}]
TOOL = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}


@pytest.fixture(scope="module")
def server(smollm2_path):
    with Server(smollm2_path, "--slots", 4, "--ctx", 1024, "--api-key", "secret") as server:
        yield server
        assert "error" not in {line["level"] for line in server.log()}


@pytest.fixture(scope="module")
def name(smollm2_path):
    return smollm2_path.stem


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url.removesuffix("/v1"), api_key="secret", max_retries=0) as client:
        yield client


def said(model, text, system=None, **options):
    return model.chat(system).send(text, temperature=0, **options)


def test_a_message(client, name, smollm2_cpu):
    done = client.messages.create(model=name, messages=HELLO, extra_body=GREEDY, max_tokens=30)
    expected = said(smollm2_cpu, HELLO[0]["content"], max_tokens=30)
    assert (done.type, done.role, done.model, done.id[:4]) == ("message", "assistant", name, "msg_")
    assert [(block.type, block.text) for block in done.content] == [("text", expected.text)]
    assert (done.stop_reason, done.stop_sequence) == ("end_turn", None)
    usage = done.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(expected.prompt_ids)
    assert usage.output_tokens == expected.timings.generated_tokens
    counted = client.messages.count_tokens(model=name, messages=HELLO)
    assert counted.input_tokens == len(expected.prompt_ids)


def test_models(client, name, smollm2_path):
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == (name, "model", name)
    assert model.created_at.timestamp() == int(smollm2_path.stat().st_mtime)
    assert client.models.retrieve(name).id == name


def test_blocks_a_system_and_turns_before(client, name, smollm2_cpu):
    chat = smollm2_cpu.chat("You are terse.\nVery.")
    first, second = (chat.send(text, temperature=0, max_tokens=12).text for text in ("Hello.", "Why?"))
    kept = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hello.", **kept}]},
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": "Why?"},
    ]
    system = [{"type": "text", "text": "You are terse."}, {"type": "text", "text": "Very.", **kept}]
    options = {"model": name, "messages": messages, "extra_body": GREEDY, "max_tokens": 12}
    done = client.messages.create(**options, system=system)
    assert done.content[0].text == second
    again = client.messages.create(**options, system="You are terse.\nVery.", metadata={"user_id": "x"})
    assert again.content == done.content
    assert (again.usage.input_tokens, again.usage.cache_creation_input_tokens) == (1, 0)


def test_an_answer_that_is_begun(client, name):
    options = {"model": name, "extra_body": GREEDY, "max_tokens": 20}
    whole = client.messages.create(messages=HELLO, **options).content[0].text
    begun = whole[:11]
    rest = client.messages.create(messages=[*HELLO, {"role": "assistant", "content": begun}], **options)
    assert rest.content[0].text == whole[11:]


def test_stop_sequences_and_a_full_context(client, name, smollm2_cpu):
    whole = said(smollm2_cpu, HELLO[0]["content"], max_tokens=30).text
    done = client.messages.create(
        model=name, messages=HELLO, extra_body=GREEDY, max_tokens=30, stop_sequences=["Rome", " France"]
    )
    assert done.content[0].text == whole.split(" France")[0]
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", " France")
    messages, goes_on = [{"role": "user", "content": " word" * 950}], {"logit_bias": {"2": -99}}
    done = client.messages.create(model=name, messages=messages, max_tokens=9000, extra_body=goes_on)
    assert done.stop_reason == "model_context_window_exceeded"
    assert done.usage.input_tokens + done.usage.cache_read_input_tokens + done.usage.output_tokens == 1024


def test_the_stream_as_it_is_sent(server, name):
    body = {"model": name, "messages": HELLO, "max_tokens": 4, "temperature": 0, "stream": True}
    status, headers, raw = server.request("POST", "/v1/messages", body, {"x-api-key": "secret"})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = [event.split("\n") for event in raw.decode().strip().split("\n\n")]
    told = [(first.removeprefix("event: "), json.loads(second.removeprefix("data: "))) for first, second in events]
    assert all(data["type"] == type_ for type_, data in told)
    assert [type_ for type_, _ in told] == [
        "message_start", "content_block_start", "ping", *["content_block_delta"] * 4, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start, delta = told[0][1]["message"], told[-2][1]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert told[1][1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 4


def test_streams(client, name):
    options = {"model": name, "messages": HELLO, "extra_body": GREEDY, "max_tokens": 30}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == sum(
        (whole.usage.input_tokens, whole.usage.cache_read_input_tokens)
    )


def test_async_clients_side_by_side(server, name, smollm2_cpu):
    questions = [f"Say something of {word}." for word in ("Paris", "water", "a cat", "the moon", "bread", "rain")]

    async def ask():
        async with anthropic.AsyncAnthropic(
            base_url=server.url.removesuffix("/v1"), auth_token="secret", max_retries=0
        ) as client:

            async def one(text):
                messages = [{"role": "user", "content": text}]
                options = {"model": name, "messages": messages, "extra_body": GREEDY, "max_tokens": 16}
                async with client.messages.stream(**options) as stream:
                    return "".join([text async for text in stream.text_stream])

            return await asyncio.gather(*map(one, questions))

    assert asyncio.run(ask()) == [said(smollm2_cpu, text, max_tokens=16).text for text in questions]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=str)
def test_tools(client, name, choice):
    options = {"model": name, "tools": [TOOL], "max_tokens": 100, "extra_body": GREEDY}
    question = [{"role": "user", "content": "How is the weather in Rome?"}]
    done = client.messages.create(**options, messages=question, tool_choice=choice)
    (block,) = done.content
    assert (done.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "get_weather")
    jsonschema.validate(block.input, TOOL["input_schema"])
    with client.messages.stream(**options, messages=question, tool_choice=choice) as stream:
        types = [event.type for event in stream]
        (streamed,) = stream.get_final_message().content
    assert (streamed.name, streamed.input) == (block.name, block.input)
    assert "input_json" in types
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "Sunny."}]}
    more = [*question, {"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**options, messages=more).stop_reason in ("end_turn", "max_tokens", "tool_use")
    # OpenAI's endpoint makes the same prompt of it.
    n_tokens = client.messages.count_tokens(model=name, messages=more, tools=[TOOL]).input_tokens
    assert n_tokens > client.messages.count_tokens(model=name, messages=question, tools=[TOOL]).input_tokens


def test_tools_that_are_not_used(client, name):
    options = {"model": name, "messages": HELLO, "extra_body": GREEDY, "max_tokens": 20}
    done = client.messages.create(**options, tools=[TOOL])
    assert [block.type for block in done.content] == ["text"]
    none = client.messages.create(**options, tools=[TOOL], tool_choice={"type": "none"})
    assert none.content == client.messages.create(**options).content


def test_thoughts(client, name):
    """Of a model that was not made for them, but is made to have some."""
    form = {"regex": "<think>It is (Rome|Paris)\\.</think>Paris\\."}
    options = {"model": name, "messages": HELLO, "max_tokens": 50, "extra_body": form}
    thought, text = client.messages.create(**options).content
    assert (thought.type, text.type, text.text) == ("thinking", "text", "Paris.")
    assert thought.thinking in ("It is Rome.", "It is Paris.")
    with client.messages.stream(**options) as stream:
        types = [event.type for event in stream]
        assert [block.type for block in stream.get_final_message().content] == ["thinking", "text"]
    assert types.index("thinking") < types.index("text")
    more = [*HELLO, {"role": "assistant", "content": [thought, text]}, {"role": "user", "content": "Really?"}]
    assert client.messages.create(model=name, messages=more, max_tokens=3).content
    begun = [*HELLO, {"role": "assistant", "content": [thought]}]
    goes_on = {"logit_bias": {"2": -99}, **GREEDY}
    (rest,) = client.messages.create(model=name, messages=begun, max_tokens=3, extra_body=goes_on).content
    assert rest.type == "thinking"


def test_an_answer_after_a_schema(client, name):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    done = client.messages.create(
        model=name, messages=HELLO, max_tokens=60, extra_body=GREEDY,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    jsonschema.validate(json.loads(done.content[0].text), schema)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "x"}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
WRONG = [
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, r'content\[0\].type is "image"; expected one of text'),
    ({"messages": [{"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]}, '"image"; expected one of text'),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "no tool_use before it"),
    ({"messages": [{"role": "user", "content": [USE]}]}, r"content\[0\] is a tool_use of the user"),
    ({"messages": [*HELLO, {"role": "assistant", "content": [USE]}]}, "expected their tool_result blocks"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, "one of system, user, assistant"),
    ({"messages": []}, "a list that is not empty"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tool_choice": {"type": "any"}}, "without tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "expected auto, none, required, or one of"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "decides how often"),
    ({"tools": [TOOL], "extra_body": {"regex": "a"}}, "a form of the answer and tools"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "never thinks before it answers"),
    (
        {"messages": [*HELLO, {"role": "assistant", "content": "It"}], "extra_body": {"regex": "a"}},
        "holds from its beginning",
    ),
    ({"max_tokens": 0}, "max_tokens is 0; expected a whole number of at least 1"),
    ({"extra_body": {"temperature": "hot"}}, "temperature"),
    ({"extra_body": {"mcp_servers": []}}, "mcp_servers is not known here"),
    ({"messages": [{"role": "user", "content": " word" * 1000}]}, "do not fit: the context holds 1024"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_refused(client, name, fields, message):
    with pytest.raises(anthropic.BadRequestError, match=message) as found:
        client.messages.create(**{"model": name, "messages": HELLO, "max_tokens": 1, **fields})
    body = found.value.body
    assert (body["type"], set(body["error"]), body["error"]["type"]) == (
        "error", {"type", "message"}, "invalid_request_error"
    )  # fmt: skip


def test_other_errors_have_anthropics_shape(client, server, name):
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'claude'") as found:
        client.messages.create(model="claude", messages=HELLO, max_tokens=1)
    assert found.value.type == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError) as found:
        client.with_options(api_key="wrong").messages.create(model=name, messages=HELLO, max_tokens=1)
    assert found.value.type == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as found:
        client.messages.batches.list()
    assert found.value.type == "not_found_error"
    status, found = server.post("/v1/messages", {"model": name, "messages": HELLO}, **{"x-api-key": "secret"})
    assert (status, found["type"]) == (400, "error")
    assert "max_tokens is missing" in found["error"]["message"]
