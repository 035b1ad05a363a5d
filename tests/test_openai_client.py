"""OpenAI's own client, unmodified, against a server process on real weights."""

import asyncio
import json
import time
from typing import Literal

import jsonschema
import numpy as np
import openai
import pytest
from pydantic import BaseModel
from serving import Server
from test_tools import CLOCK, WEATHER

HELLO = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def server(smollm2_path):
    with Server("stories260k", smollm2_path, "--slots", 4) as server:
        yield server


@pytest.fixture(scope="module")
def name(smollm2_path):
    return smollm2_path.stem


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_models(client, name):
    assert [model.id for model in client.models.list()] == ["stories260k", name]
    assert client.models.retrieve(name).object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; expected one of stories260k"):
        client.models.retrieve("gpt-4")


def test_chat(client, name, smollm2_cpu):
    done = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_completion_tokens=30)
    expected = smollm2_cpu.chat().send(HELLO[0]["content"], temperature=0, max_tokens=30)
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, choice.logprobs, choice.index) == (expected.finish_reason, None, 0)
    assert done.object == "chat.completion"
    assert done.usage.prompt_tokens == len(expected.prompt_ids)
    assert done.usage.completion_tokens == expected.timings.generated_tokens
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_a_chat_that_goes_on(client, name, smollm2_cpu):
    chat = smollm2_cpu.chat("You are terse.")
    first, second = (chat.send(text, temperature=0, max_tokens=12).text for text in ("Hello.", "Why?"))
    messages = [
        {"role": "developer", "content": "You are terse."},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Why?"},
    ]
    done = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=12)
    assert done.choices[0].message.content == second
    again = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=12)
    assert again.choices == done.choices
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_the_next_turn_is_prepared_while_nothing_is_asked(client, name):
    """Up to where the message will stand; how soon depends on what else the machine does."""
    for seconds in (0.3, 1, 3, 9):
        messages = [{"role": "user", "content": f"Say the number {seconds}, and no more."}]
        first = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=60)
        assert first.choices[0].finish_reason == "stop"
        time.sleep(seconds)
        messages.append({"role": "assistant", "content": first.choices[0].message.content})
        messages.append({"role": "user", "content": "Why?"})
        second = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=2)
        n_more = second.usage.prompt_tokens_details.cached_tokens - first.usage.total_tokens
        if n_more >= 0:
            break
    assert n_more == len(["\n", "<|im_start|>", "user", "\n"])


def test_an_answer_that_is_gone_on_with(client, name):
    options = {"model": name, "temperature": 0, "extra_body": {"continue_final_message": True}}
    whole = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=30).choices[0].message
    begun = whole.content[: whole.content.index(" is ")]
    messages = [*HELLO, {"role": "assistant", "content": begun}]
    done = client.chat.completions.create(messages=messages, max_tokens=30, **options)
    assert begun + done.choices[0].message.content == whole.content
    messages = [*HELLO, {"role": "assistant", "content": "<|im_end|>"}]  # of a message it is text
    told = client.chat.completions.create(messages=messages, max_tokens=1, **options)
    asked = client.chat.completions.create(model=name, messages=HELLO, max_tokens=1)
    assert told.usage.prompt_tokens > asked.usage.prompt_tokens + 4
    for messages, more in ((HELLO, {}), ([*HELLO, whole], {"tools": [CLOCK]}), ([whole], {})):
        with pytest.raises(openai.BadRequestError, match="continue_final_message"):
            client.chat.completions.create(messages=messages, **options, **more)


def test_streamed_chat(client, name):
    options = {"model": name, "messages": HELLO, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.object, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    *told, last, usage = chunks
    assert told[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in told[1:])
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in told)
    assert "".join(chunk.choices[0].delta.content for chunk in told) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_as_it_is_sent(server, name):
    body = {"model": name, "messages": HELLO, "max_tokens": 3, "stream": True}
    status, headers, raw = server.request("POST", "/v1/chat/completions", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_async_clients_side_by_side(server, name, smollm2_cpu):
    words = ["Paris", "water", "a cat", "the moon", "bread", "rain"]
    questions = [f"Say something of {word}." for word in words]

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def one(text):
                stream = await client.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, questions))

    expected = [smollm2_cpu.chat().send(text, temperature=0, max_tokens=16).text for text in questions]
    assert asyncio.run(ask()) == expected


def test_several_answers(client, name, smollm2_cpu):
    options = {"model": name, "messages": HELLO, "temperature": 1.5, "seed": 7, "max_tokens": 8, "n": 3}
    done = client.chat.completions.create(**options)
    expected = [
        smollm2_cpu.chat().send(HELLO[0]["content"], temperature=1.5, seed=seed, max_tokens=8).text
        for seed in (7, 8, 9)
    ]
    assert [choice.message.content for choice in done.choices] == expected
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_logprobs(client, name, smollm2_cpu):
    options = {"model": name, "messages": HELLO, "temperature": 0, "max_tokens": 6, "logprobs": True}
    done = client.chat.completions.create(**options, top_logprobs=3)
    expected = smollm2_cpu.chat().send(HELLO[0]["content"], temperature=0, max_tokens=6, logprobs=3)
    content = done.choices[0].logprobs.content
    assert "".join(each.token for each in content) == expected.text
    assert b"".join(bytes(each.bytes) for each in content).decode() == expected.text
    np.testing.assert_allclose(
        [[each.logprob, *(other.logprob for other in each.top_logprobs)] for each in content],
        [[each.logprob, *(value for _, value in each.top)] for each in expected.logprobs],
        atol=1e-5,
    )
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = [each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.token for each in streamed] == [each.token for each in content]
    assert all(each.top_logprobs == [] for each in streamed)


def test_stop_bias_and_samplers(client, name, smollm2_cpu):
    options = {"temperature": 0, "max_tokens": 30}
    said = smollm2_cpu.chat().send(HELLO[0]["content"], **options)
    done = client.chat.completions.create(model=name, messages=HELLO, stop=[" France", "Rome"], **options)
    assert done.choices[0].message.content == said.text.split(" France")[0]
    assert done.choices[0].finish_reason == "stop"
    first = said.ids[0]
    other = client.chat.completions.create(model=name, messages=HELLO, logit_bias={str(first): -100}, **options)
    expected = smollm2_cpu.chat().send(HELLO[0]["content"], logit_bias={first: -100}, **options)
    assert other.choices[0].message.content == expected.text != said.text
    more = {"top_k": 20, "min_p": 0.02, "dry_multiplier": 0.8, "repeat_penalty": 1.1, "seed": 4, "max_tokens": 20}
    done = client.chat.completions.create(model=name, messages=HELLO, extra_body=more)
    assert done.choices[0].message.content == smollm2_cpu.chat().send(HELLO[0]["content"], **more).text


class City(BaseModel):
    name: str
    country: Literal["France", "Italy"]
    is_capital: bool


def test_an_answer_after_a_schema(client, name):
    done = client.chat.completions.parse(
        model=name, messages=HELLO, response_format=City, temperature=0, max_tokens=100
    )
    assert isinstance(done.choices[0].message.parsed, City)
    done = client.chat.completions.create(
        model=name, messages=HELLO, response_format={"type": "json_object"}, max_tokens=200, temperature=0, seed=1
    )
    assert done.choices[0].finish_reason == "length" or isinstance(json.loads(done.choices[0].message.content), dict)
    with client.chat.completions.stream(
        model=name, messages=HELLO, response_format=City, temperature=0, max_tokens=100
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_tools(client, name, choice):
    options = {"model": name, "tools": [WEATHER, CLOCK], "max_tokens": 100, "seed": 1}
    question = [{"role": "user", "content": "How is the weather in Rome?"}]
    done = client.chat.completions.create(**options, messages=question, tool_choice=choice)
    message = done.choices[0].message
    assert (done.choices[0].finish_reason, message.content) == ("tool_calls", None)
    (call,) = message.tool_calls
    assert (call.type, len(call.id)) == ("function", 9)
    if call.function.name == "get_weather":
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    streamed = list(client.chat.completions.create(**options, messages=question, tool_choice=choice, stream=True))
    assert streamed[-1].choices[0].finish_reason == "tool_calls"
    (found,) = [each for chunk in streamed for each in chunk.choices[0].delta.tool_calls or ()]
    assert (found.index, found.function.model_dump()) == (0, call.function.model_dump())
    more = [*question, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}]
    assert client.chat.completions.create(**options, messages=more).choices[0].finish_reason in ("stop", "length")


def test_tools_that_are_not_used(client, name):
    done = client.chat.completions.create(model=name, messages=HELLO, tools=[WEATHER], temperature=0, max_tokens=20)
    assert done.choices[0].message.tool_calls is None
    assert done.choices[0].message.content


def test_completions(client, stories_cpu):
    options = {"temperature": 0, "max_tokens": 12}
    done = client.completions.create(model="stories260k", prompt="Once upon a time", **options)
    expected = stories_cpu.generate("Once upon a time", **options)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (expected.text, "length")
    prompts = ["The dog", "Lily"]
    done = client.completions.create(model="stories260k", prompt=prompts, n=2, seed=3, max_tokens=9, temperature=1.2)
    expected = [
        stories_cpu.generate(p, seed=seed, max_tokens=9, temperature=1.2).text for p in prompts for seed in (3, 4)
    ]
    assert [(choice.index, choice.text) for choice in done.choices] == list(enumerate(expected))
    assert done.usage.prompt_tokens == sum(len(stories_cpu.tokenize(prompt)) for prompt in prompts)
    assert client.completions.create(model="stories260k", prompt="Once").usage.completion_tokens == 16


def test_streamed_completions(client, stories_cpu):
    options = {"temperature": 0, "max_tokens": 12, "echo": True, "logprobs": 1}
    whole = client.completions.create(model="stories260k", prompt="Once upon", **options).choices[0]
    *chunks, last = client.completions.create(model="stories260k", prompt="Once upon", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert {chunk.choices[0].finish_reason for chunk in chunks} == {None}
    assert last.choices[0].finish_reason == "length"
    for name in ("tokens", "token_logprobs", "text_offset"):
        told = [each for chunk in chunks for each in getattr(chunk.choices[0].logprobs, name)]
        assert told == getattr(whole.logprobs, name)


def test_scores_of_prompts_as_an_evaluation_asks_for_them(client, stories_cpu):
    """As lm-evaluation-harness: token ids, echo, one token more, which is left out."""
    texts = ["Once upon a time there was a little girl", "The dog was big and red. " * 20, "Lily's mom said no"]
    prompts = [stories_cpu.tokenize(text) for text in texts]
    done = client.completions.create(
        model="stories260k", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1234
    )
    for ids, choice in zip(prompts, done.choices, strict=True):
        logits = stories_cpu.logits(ids)[:-1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found = choice.logprobs
        assert found.token_logprobs[0] is None
        assert len(found.tokens) == len(found.top_logprobs) == len(ids) + 1
        np.testing.assert_allclose(found.token_logprobs[1:-1], logits[range(len(ids) - 1), ids[1:]], atol=1e-5)
        best = [max(top.values()) for top in found.top_logprobs[1:-1]]
        np.testing.assert_allclose(best, logits.max(axis=1), atol=1e-5)
    offsets = done.choices[0].logprobs.text_offset
    assert offsets[0] == offsets[1] == 0  # BOS has no text
    assert done.choices[0].text[: offsets[3]] == "Once upon"


def test_embeddings(client, name, smollm2_cpu):
    texts = [
        "The dog ran to the park.",
        "Rain fell on the city. " * 40,
        "x",
        *(f"Number {i} is here." for i in range(40)),
    ]
    found = client.embeddings.create(model=name, input=texts)  # the client asks for base64, and decodes it
    expected = np.stack([smollm2_cpu.embed(text) for text in texts])
    assert [each.index for each in found.data] == list(range(len(texts)))
    np.testing.assert_array_equal(np.array([each.embedding for each in found.data], np.float32), expected)
    assert (
        found.usage.prompt_tokens == found.usage.total_tokens == sum(len(smollm2_cpu.tokenize(text)) for text in texts)
    )
    as_ids = client.embeddings.create(
        model=name, input=[smollm2_cpu.tokenize(text) for text in texts[:2]], encoding_format="float"
    )
    np.testing.assert_array_equal(np.array([each.embedding for each in as_ids.data], np.float32), expected[:2])
    one = client.embeddings.create(model=name, input=smollm2_cpu.tokenize(texts[0]), dimensions=64)
    cut = expected[0, :64] / np.linalg.norm(expected[0, :64])
    np.testing.assert_allclose(one.data[0].embedding, cut, atol=1e-6)
    last = client.embeddings.create(model=name, input="x", extra_body={"pooling": "last"})
    np.testing.assert_array_equal(last.data[0].embedding, smollm2_cpu.embed("x", pooling="last"))


def test_responses(client, name, smollm2_cpu):
    done = client.responses.create(
        model=name, input=HELLO[0]["content"], temperature=0, max_output_tokens=30, metadata={"a": "b"}
    )
    expected = smollm2_cpu.chat().send(HELLO[0]["content"], temperature=0, max_tokens=30)
    assert (done.object, done.status, done.output_text) == ("response", "completed", expected.text)
    assert (done.usage.input_tokens, done.usage.output_tokens) == (
        len(expected.prompt_ids), expected.timings.generated_tokens
    )  # fmt: skip
    assert (done.metadata, done.error, done.incomplete_details, done.temperature) == ({"a": "b"}, None, None, 0)
    (message,) = done.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    cut = client.responses.create(model=name, input=HELLO, temperature=0, max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert expected.text.startswith(cut.output_text)


def test_responses_that_go_on(client, name, smollm2_cpu):
    """With what was answered before as input, as the client has it."""
    options = {"model": name, "instructions": "You are terse.", "temperature": 0, "max_output_tokens": 12}
    chat = smollm2_cpu.chat("You are terse.")
    first, second = (chat.send(text, temperature=0, max_tokens=12).text for text in ("Hello.", "Why?"))
    done = client.responses.create(input=[{"role": "user", "content": "Hello."}], **options)
    assert done.output_text == first
    part = {"type": "input_text", "text": "Why?"}
    given = [
        {"role": "user", "content": "Hello."},
        *(item.model_dump(exclude_none=True) for item in done.output),
        {"type": "message", "role": "user", "content": [part]},
    ]
    done = client.responses.create(input=given, **options)
    assert done.output_text == second
    assert done.usage.input_tokens_details.cached_tokens > 20


def test_streamed_responses(client, name):
    options = {"model": name, "input": HELLO, "temperature": 0, "max_output_tokens": 30}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    n_deltas = types.count("response.output_text.delta")
    assert n_deltas > 3
    assert types == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * n_deltas, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    ids = {event.item_id for event in events if hasattr(event, "item_id")}
    last = events[-1].response
    assert (ids, last.output_text, last.usage.output_tokens) == (
        {last.output[0].id}, whole.output_text, whole.usage.output_tokens
    )  # fmt: skip
    assert events[0].response.status == "in_progress"
    with client.responses.stream(**options) as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_the_log_probabilities_of_responses(client, name, smollm2_cpu):
    options = {"model": name, "input": HELLO, "temperature": 0, "max_output_tokens": 6, "top_logprobs": 2}
    asked = {"include": ["message.output_text.logprobs"]}
    done = client.responses.create(**options, **asked)
    expected = smollm2_cpu.chat().send(HELLO[0]["content"], temperature=0, max_tokens=6, logprobs=2)
    found = done.output[0].content[0].logprobs
    assert "".join(each.token for each in found) == expected.text
    assert [len(each.top_logprobs) for each in found] == [2] * 6
    streamed = [
        each.token
        for event in client.responses.create(**options, **asked, stream=True)
        if event.type == "response.output_text.delta"
        for each in event.logprobs
    ]
    assert "".join(streamed) == expected.text


def test_responses_after_a_schema(client, name):
    done = client.responses.parse(model=name, input=HELLO, text_format=City, temperature=0, max_output_tokens=100)
    assert isinstance(done.output_parsed, City)


FLAT = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}], ids=str)
def test_tools_of_responses(client, name, choice):
    options = {"model": name, "tools": FLAT, "max_output_tokens": 100, "extra_body": {"seed": 1}}
    question = [{"role": "user", "content": "How is the weather in Rome?"}]
    done = client.responses.create(**options, input=question, tool_choice=choice)
    (call,) = done.output
    assert (done.status, call.type, call.status) == ("completed", "function_call", "completed")
    if call.name == "get_weather":
        jsonschema.validate(json.loads(call.arguments), WEATHER["function"]["parameters"])
    events = list(client.responses.create(**options, input=question, tool_choice=choice, stream=True))
    assert [event.type for event in events[2:-1]] == [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done",
    ]  # fmt: skip
    assert (events[3].delta, events[4].arguments, events[5].item.name) == (call.arguments, call.arguments, call.name)
    more = [
        *question, call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
    ]  # fmt: skip
    assert client.responses.create(**options, input=more).status in ("completed", "incomplete")


def test_what_responses_do_not_have(client, name):
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"),
        ({"background": True}, "background"), ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"), ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"), ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"tools": FLAT, "text": {"format": {"type": "json_object"}}}, "text"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as found:
            client.responses.create(**{"model": name, "input": "Hi", "max_output_tokens": 1, **fields})
        assert found.value.param == param


def test_text_and_tokens(server, name, smollm2_cpu, stories_cpu):
    text = "Café <|im_end|>"
    assert server.post("/tokenize", {"model": name, "content": text})[1]["tokens"] == smollm2_cpu.tokenize(text)
    plain = smollm2_cpu.tokenize(text, parse_special=False)
    assert server.post("/tokenize", {"model": name, "content": text, "parse_special": False})[1]["tokens"] == plain
    with_bos = server.post("/tokenize", {"model": "stories260k", "prompt": "Once"})[1]
    assert with_bos["tokens"] == stories_cpu.tokenize("Once") == [1, *with_bos["tokens"][1:]]
    found = server.post("/tokenize", {"model": name, "content": "é🎈", "with_pieces": True})[1]["tokens"]
    raw = b"".join(
        bytes(each["piece"]) if isinstance(each["piece"], list) else each["piece"].encode() for each in found
    )
    assert raw.decode() == "é🎈"
    tokens = [each["id"] for each in found]
    assert server.post("/detokenize", {"model": name, "tokens": tokens})[1]["content"] == "é🎈"
    shown = server.post("/apply-template", {"model": name, "messages": HELLO})[1]["prompt"]
    assert shown.endswith("<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n")
    info = server.get(f"/tokenizer_info?model={name}")[1]
    assert info["eos_token"] == "<|im_end|>"
    props = server.get(f"/props?model={name}")[1]
    assert (props["default_generation_settings"]["n_ctx"], props["total_slots"]) == (8192, 4)
