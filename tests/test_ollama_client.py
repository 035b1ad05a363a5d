"""Ollama's own client, unmodified, against a server process on real weights."""

import asyncio
import json
from datetime import datetime, timezone

import jsonschema
import numpy as np
import ollama
import pytest
from serving import BREAKS_MIDWAY, Server, until
from test_tools import WEATHER

from edgellm import __version__
from edgellm.server.endpoints.ollama import _messages

HELLO = [{"role": "user", "content": "Name the capital of France."}]
GREEDY = {"temperature": 0, "num_predict": 30}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def server(smollm2_path):
    with Server("stories260k", smollm2_path, "--slots", 4, "--ctx", 512) as server:
        yield server
        assert "error" not in {line["level"] for line in server.log()}


@pytest.fixture(scope="module")
def name(smollm2_path):
    return smollm2_path.stem


@pytest.fixture(scope="module")
def client(server):
    with ollama.Client(f"http://127.0.0.1:{server.port}") as client:
        yield client


def said(model, text=HELLO[0]["content"], system=None, max_tokens=30, **options):
    return model.chat(system).send(text, temperature=0, max_tokens=max_tokens, **options)


def test_a_chat(client, name, smollm2_cpu):
    done = client.chat(f"{name}:latest", HELLO, options=GREEDY)
    expected = said(smollm2_cpu)
    assert (done.model, done.message.role, done.message.content) == (name, "assistant", expected.text)
    assert (done.done, done.done_reason) == (True, "stop")
    assert done.prompt_eval_count == len(expected.prompt_ids)
    assert done.eval_count == expected.timings.generated_tokens
    assert all(done[each] > 0 for each in DURATIONS if each != "load_duration")
    assert done.total_duration >= done.prompt_eval_duration + done.eval_duration
    age = datetime.now(timezone.utc) - datetime.fromisoformat(done.created_at.replace("Z", "+00:00"))
    assert 0 <= age.total_seconds() < 60
    assert done.message.thinking is done.message.tool_calls is done.logprobs is None


def test_turns_before_and_an_answer_that_is_begun(client, name, smollm2_cpu):
    chat = smollm2_cpu.chat("You are terse.")
    first, answer = (chat.send(text, temperature=0, max_tokens=12) for text in ("Hello.", "Why?"))
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Why?"},
    ]
    options = {"temperature": 0, "num_predict": 12}
    done, second = client.chat(name, messages, options=options), answer.text
    assert (done.message.content, done.done_reason) == (second, answer.finish_reason)
    at = second.index(" ")
    begun = [*messages, {"role": "assistant", "content": second[:at]}]
    assert client.chat(name, begun, options=options).message.content.startswith(second[at:])


def test_streams(client, name):
    whole = client.chat(name, HELLO, options=GREEDY)
    *told, last = client.chat(name, HELLO, options=GREEDY, stream=True)
    assert "".join(each.message.content for each in told) == whole.message.content
    assert {(each.done, each.done_reason, each.eval_count) for each in told} == {(False, None, None)}
    assert len(told) > 5
    assert (last.done, last.done_reason, last.message.content) == (True, whole.done_reason, "")
    assert (last.prompt_eval_count, last.eval_count) == (whole.prompt_eval_count, whole.eval_count)


def test_the_stream_as_it_is_sent(server, name):
    body = {"model": name, "messages": HELLO, "options": {"temperature": 0, "num_predict": 3}}
    status, headers, raw = server.request("POST", "/api/chat", body)
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    *told, last = (json.loads(line) for line in raw.decode().splitlines())
    assert all(set(each) == {"model", "created_at", "message", "done"} for each in told)
    counts = {"prompt_eval_count", "eval_count"}
    assert set(last) == {"model", "created_at", "message", "done", "done_reason", *DURATIONS, *counts}
    body = {"model": name, "prompt": "Hi", "options": {"num_predict": 3}}
    *told, last = (json.loads(line) for line in server.post("/api/generate", body)[1].splitlines())
    assert all(set(each) == {"model", "created_at", "response", "done"} for each in told)
    assert last["response"] == ""


def test_async_clients_side_by_side(server, name, smollm2_cpu):
    questions = [f"Say something of {word}." for word in ("Paris", "water", "a cat", "the moon", "bread", "rain")]

    async def ask():
        async with ollama.AsyncClient(f"http://127.0.0.1:{server.port}") as client:

            async def one(text):
                messages = [{"role": "user", "content": text}]
                stream = await client.chat(name, messages, options={**GREEDY, "num_predict": 16}, stream=True)
                return "".join([each.message.content async for each in stream])

            return await asyncio.gather(*map(one, questions))

    assert asyncio.run(ask()) == [said(smollm2_cpu, text, max_tokens=16).text for text in questions]


def test_prompts(client, name, smollm2_cpu, stories_cpu):
    done = client.generate(name, HELLO[0]["content"], system="You are terse.", options=GREEDY)
    assert done.response == said(smollm2_cpu, system="You are terse.").text
    told = client.generate(name, HELLO[0]["content"], system="You are terse.", options=GREEDY, stream=True)
    assert "".join(each.response for each in told) == done.response
    raw = client.generate(name, "Once upon a time", raw=True, options=GREEDY)
    assert raw.response == smollm2_cpu.generate("Once upon a time", temperature=0, max_tokens=30).text
    plain = client.generate("stories260k", "Once upon a time", options=GREEDY)
    assert plain.response == stories_cpu.generate("Once upon a time", temperature=0, max_tokens=30).text


def test_options(client, name, smollm2_cpu):
    question = HELLO[0]["content"]
    options = {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repeat_penalty": 1.1, "seed": 4, "dry_multiplier": 0.8}
    about_the_machine = {"num_thread": 4, "num_gpu": 0, "use_mmap": True, "num_keep": 4, "num_batch": 64}
    done = client.chat(name, HELLO, options={**options, **about_the_machine, "num_predict": 20})
    assert done.message.content == smollm2_cpu.chat().send(question, **options, max_tokens=20).text
    whole = said(smollm2_cpu).text
    done = client.chat(name, HELLO, options={**GREEDY, "stop": ["Rome", " France"]})
    assert (done.message.content, done.done_reason) == (whole.split(" France")[0], "stop")
    n_prompt = client.chat(name, HELLO, options={"num_predict": 1}).prompt_eval_count
    done = client.chat(name, HELLO, options={"temperature": 0, "num_predict": -1, "num_ctx": n_prompt + 4, "seed": -1})
    assert (done.eval_count, done.done_reason) == (4, "length")
    with pytest.raises(ollama.ResponseError, match=f"do not fit: the context holds {n_prompt};"):
        client.chat(name, HELLO, options={"num_ctx": n_prompt})
    # One that is larger than what there is changes nothing.
    assert client.chat(name, HELLO, options={**GREEDY, "num_ctx": 99999}).message.content == whole
    again = client.chat(name, HELLO, options={"temperature": 0, "num_predict": 12, "repeat_last_n": -1})
    assert again.message.content == said(smollm2_cpu, max_tokens=12).text


SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}


def test_formats(client, name):
    done = client.chat(name, HELLO, format=SCHEMA, options={"temperature": 0, "num_predict": 60})
    jsonschema.validate(json.loads(done.message.content), SCHEMA)
    done = client.generate(name, HELLO[0]["content"], format=SCHEMA, options={"temperature": 0, "num_predict": 60})
    jsonschema.validate(json.loads(done.response), SCHEMA)
    done = client.generate(name, "An object, please.", format="json", options={"num_predict": 100, "seed": 1})
    assert done.done_reason == "length" or isinstance(json.loads(done.response), dict)
    assert client.chat(name, HELLO, format="", options=GREEDY).message.content


def test_logprobs(client, name, smollm2_cpu):
    options = {"temperature": 0, "num_predict": 6}
    done = client.chat(name, HELLO, options=options, logprobs=True, top_logprobs=3)
    expected = said(smollm2_cpu, max_tokens=6, logprobs=3)
    assert "".join(each.token for each in done.logprobs) == expected.text
    np.testing.assert_allclose(
        [[each.logprob, *(other.logprob for other in each.top_logprobs)] for each in done.logprobs],
        [[each.logprob, *(value for _, value in each.top)] for each in expected.logprobs],
        atol=1e-5,
    )
    told = client.generate(name, "Once", raw=True, options=options, logprobs=True, stream=True)
    assert sum(len(each.logprobs or ()) for each in told) == 6


def weather(city: str, is_celsius: bool) -> str:
    """How the weather is.

    Args:
        city: a city
        is_celsius: in which degrees
    """
    return f"Sunny in {city}."


CALLS = """
from edgellm.server import turn
question = turn.question
turn.question = lambda model, prompt, messages, tools, choice: question(
    model, prompt, messages, tools, "required" if tools and messages[-1]["role"] == "user" else choice)
"""
"""SmolLM2 calls nothing of its own accord, and Ollama's API has no way to ask for a call."""


def test_tools(smollm2_path, name):
    question = [{"role": "user", "content": "How is the weather in Rome?"}]
    with Server(smollm2_path, before=CALLS) as server, ollama.Client(f"http://127.0.0.1:{server.port}") as client:
        options = {"temperature": 0, "num_predict": 60}
        done = client.chat(name, question, tools=[weather], options=options)
        (call,) = done.message.tool_calls
        assert (done.done_reason, done.message.content, call.function.name) == ("stop", "", "weather")
        assert {key: type(value) for key, value in call.function.arguments.items()} == {"city": str, "is_celsius": bool}
        *told, called, last = client.chat(name, question, tools=[weather], options=options, stream=True)
        assert (called.message.tool_calls, last.done) == (done.message.tool_calls, True)
        assert not any(each.message.content for each in told)
        result = {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
        more = [*question, done.message, result]
        again = client.chat(name, more, tools=[weather], options=options)
        assert again.prompt_eval_count > done.prompt_eval_count
        assert again.message.content or again.message.tool_calls


def test_results_find_their_calls():
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    results = [
        {"role": "tool", "content": "1", "tool_name": "g"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3", "tool_name": "f"},
        {"role": "tool", "content": "4", "tool_name": "h"},
    ]
    found = _messages([{"role": "assistant", "tool_calls": calls}, *results])
    ids = [call["id"] for call in found[0]["tool_calls"]]
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert [(each.get("tool_call_id"), each["name"]) for each in found[1:]] == [
        (ids[1], "g"),
        (ids[0], "f"),
        (ids[2], "f"),
        (None, "h"),
    ]


def test_thoughts(client, name):
    """Of a model that was not made for them, but is made to have some."""
    schema = {"type": "string", "pattern": "^<think>It is Rome\\.</think>Paris\\.$"}
    options = {"num_predict": 60}
    done = client.chat(name, HELLO, format=schema, think=False, options=options)
    assert (done.message.thinking, done.message.content) == ("It is Rome.", '"Paris."')
    told = list(client.generate(name, "Hm?", format=schema, options=options, stream=True))
    assert "".join(each.thinking or "" for each in told) == "It is Rome."
    assert "".join(each.response for each in told) == '"Paris."'
    raw = client.generate(name, "Hm?", format=schema, options=options, raw=True)
    assert (raw.thinking, raw.response) == (None, '"<think>It is Rome.</think>Paris."')


def test_embeddings(client, name, smollm2_cpu):
    texts = ["a cat sits", "a kitten rests", "tax law"]
    found = client.embed(name, texts)
    assert found.prompt_eval_count == sum(len(smollm2_cpu.tokenize(text)) for text in texts)
    np.testing.assert_allclose(found.embeddings, [smollm2_cpu.embed(text) for text in texts], atol=1e-3)
    one = client.embed(name, texts[0])
    np.testing.assert_allclose(one.embeddings, found.embeddings[:1], atol=1e-6)
    np.testing.assert_allclose(client.embeddings(name, texts[0]).embedding, found.embeddings[0], atol=1e-6)
    short = client.embed(name, texts[0], dimensions=8).embeddings[0]
    assert (len(short), round(float(np.linalg.norm(short)), 5)) == (8, 1.0)
    assert client.embed(name, []).embeddings == []
    with pytest.raises(ollama.ResponseError, match=r"input\[1\].*the context holds 512"):
        client.embed(name, ["a", "word " * 600])
    cut = client.embed(name, ["a", "word " * 600], truncate=True)
    assert cut.prompt_eval_count == 1 + 512


def test_models(client, name, smollm2_path):
    assert [each.model for each in client.list().models] == ["stories260k", name]
    listed = client.list().models[1]
    assert (listed.size, len(listed.digest)) == (smollm2_path.stat().st_size, 64)
    assert listed.modified_at == datetime.fromtimestamp(smollm2_path.stat().st_mtime, timezone.utc)
    assert listed.details.family == "llama"
    assert (listed.details.parameter_size, listed.details.quantization_level) == ("134.5M", "Q4M")
    shown = client.show(name)
    assert (shown.details, shown.capabilities) == (listed.details, ["completion", "tools"])
    assert shown.modelinfo["general.architecture"] == "llama"
    assert (shown.modelinfo["llama.context_length"], shown.modelinfo["llama.embedding_length"]) == (8192, 576)
    assert "im_start" in shown.template
    assert client.show("stories260k").capabilities == ["completion"]
    with pytest.raises(ollama.ResponseError, match="there is no model 'gemma3'; expected one of stories260k") as error:
        client.show("gemma3")
    assert error.value.status_code == 404


def test_models_come_and_go(client, server, name):
    assert client.chat(name, []).done_reason == "load"
    assert client.generate(name, keep_alive="2m").done_reason == "load"
    (loaded,) = [each for each in client.ps().models if each.model == name]
    left = (loaded.expires_at - datetime.now(timezone.utc)).total_seconds()
    assert 100 < left <= 120
    assert (loaded.context_length, loaded.size_vram) == (512, 0)
    assert client.generate(name, keep_alive=0).done_reason == "unload"
    until(lambda: name not in [each.model for each in client.ps().models])
    assert client.generate(name, keep_alive=0).done_reason == "unload"
    assert name not in [each.model for each in client.ps().models]
    assert client.chat(name, HELLO, options={"num_predict": 1}, keep_alive=1e300).load_duration > 0
    assert client.ps().models[0].expires_at.year == 9999
    client.generate(name, keep_alive=-1)
    assert server.request("HEAD", "/")[0] == 200
    assert server.get("/api/version") == (200, {"version": __version__})


@pytest.mark.parametrize(
    ("method", "arguments", "command"),
    [
        ("pull", ["x"], "edgellm pull NAME"), ("push", ["x"], "edgellm export"), ("delete", ["x"], "edgellm rm NAME"),
        ("copy", ["x", "y"], "edgellm serve FILE"), ("create", ["x"], "edgellm convert"),
    ],
)  # fmt: skip
def test_what_would_change_the_store(client, method, arguments, command):
    with pytest.raises(ollama.ResponseError, match=command) as error:
        getattr(client, method)(*arguments)
    assert error.value.status_code == 403


IMAGE = {"role": "user", "content": "What is it?", "images": [b"x"]}
WRONG = [
    ("chat", {"messages": [IMAGE]}, r"messages\[0\].images is given, but no model here sees images"),
    ("chat", {"messages": [{"role": "robot", "content": ""}]}, "one of system, user, assistant, tool"),
    ("chat", {"options": {"tfs_z": 1}}, "options.tfs_z is not known here"),
    ("chat", {"options": {"temprature": 1}}, "options.temprature is not known here"),
    ("chat", {"options": {"top_p": 2}}, "options.top_p is 2"),
    ("chat", {"think": True}, "the model never thinks before it answers"),
    ("chat", {"think": "high"}, 'think is "high"; expected true or false'),
    ("chat", {"format": {"type": "x"}}, "x"),
    ("chat", {"format": SCHEMA, "tools": [WEATHER]}, "format and tools are both given"),
    ("chat", {"top_logprobs": 2}, "expected logprobs: true"),
    ("chat", {"messages": [{"role": "user", "content": " word" * 600}]}, "do not fit: the context holds 512"),
    ("chat", {"model": "stories260k"}, "no chat template"),
    ("generate", {"prompt": "a", "suffix": "b"}, "suffix is given"),
    ("generate", {"prompt": "a", "template": "b"}, "template is given"),
    ("generate", {"prompt": "a", "context": [1]}, "turns before this one are messages of /api/chat"),
    ("generate", {"prompt": "a", "images": [b"x"]}, "no model here sees images"),
    ("generate", {"prompt": "a", "raw": True, "system": "b"}, "system is given, but the prompt has no template"),
    ("generate", {"model": "stories260k", "prompt": "a", "system": "b"}, "the prompt has no template"),
    ("generate", {"prompt": "a", "width": 100}, "width is not known here"),
]


@pytest.mark.parametrize(("method", "fields", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_refused(client, name, method, fields, message):
    given = {"model": name, **({"messages": HELLO} if method == "chat" else {}), **fields}
    with pytest.raises(ollama.ResponseError, match=message) as error:
        getattr(client, method)(**given)
    assert error.value.status_code == 400


def test_other_errors_have_ollamas_shape(server):
    assert server.post("/api/chat", {"messages": []}) == (400, {"error": "model is missing; expected a text"})
    assert set(server.get("/api/nothing")[1]) == set(server.get("/api/chat")[1]) == {"error"}
    status, found = server.post("/api/embed", {"model": "x", "input": "a"})
    assert (status, set(found)) == (404, {"error"})


def test_an_error_in_the_middle_of_a_stream():
    with (
        Server("stories260k", before=BREAKS_MIDWAY) as server,
        ollama.Client(f"http://127.0.0.1:{server.port}") as client,
        pytest.raises(ollama.ResponseError, match="the server failed at request"),
    ):
        list(client.generate("stories260k", "Once upon a time", options={"temperature": 1}, stream=True))
