"""A server process as clients meet it that do what they should not, or that are many."""

import http.client
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jsonschema
import openai
import pytest
from conftest import BUNDLED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from serving import BREAKS_MIDWAY, Server, until
from test_cli import edgellm

from edgellm.errors import ArgumentError
from edgellm.server.endpoints import endpoints
from edgellm.server.security import check_public, is_local

MODEL = "stories260k"
STORY = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
LONG = {"model": MODEL, "prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 500}
BODIES = {
    "/v1/completions": STORY,
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/embeddings": {"input": "Once"},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/rerank": {"query": "Who?", "documents": ["Once"]},
    "/api/chat": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "/api/generate": {"model": MODEL, "prompt": "Once", "options": {"num_predict": 2}},
    "/api/embed": {"model": MODEL, "input": "Once"},
    "/api/embeddings": {"model": MODEL, "prompt": "Once"},
    "/api/show": {"model": MODEL},
    "/tokenize": {"content": "Once"},
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": [{"role": "user", "content": "Hi"}]},
}


@pytest.fixture(scope="module")
def server():
    with Server(MODEL, "--slots", 2, "--queue", 2) as server:
        yield server
        status, found = server.post("/v1/completions", STORY)
        assert (status, found["choices"][0]["text"]) == (200, ", there was a")
        assert "error" not in {line["level"] for line in server.log()}
        assert server.end() == -signal.SIGTERM


def is_described(server, path, body):
    """Whether /openapi.json allows it."""
    return described(server, path).is_valid(body)


@cache
def described(server, path):
    found = server.get("/openapi.json")[1]["paths"][path]["post"]["requestBody"]
    return jsonschema.Draft202012Validator(found["content"]["application/json"]["schema"])


ELSEWHERE = [f"/api/{name}" for name in ("pull", "push", "create", "copy", "delete")]
"""What Ollama has, and is not done over HTTP."""


def refused(path, found):
    """The message, the field and the code of an error, in the shape of the API that has the path."""
    if path.startswith("/api/"):
        assert set(found) == {"error"}
        assert found["error"]
        return found["error"], None, None
    if path.startswith("/v1/messages"):
        assert (set(found), found["type"], set(found["error"])) == ({"type", "error"}, "error", {"type", "message"})
        assert found["error"]["message"]
        return found["error"]["message"], None, None
    error = found["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"], error["param"], error["code"]


# Requests that are wrong.


RAW = [
    (b"", "no JSON"),
    (b"{", "no JSON"),
    (b"\xff\xfe{", "not UTF-8 at byte 0"),
    (b'{"prompt": "\xc3"}', "not UTF-8"),
    (b'{"prompt": NaN}', "the number NaN"),
    (b'{"prompt": "a", "temperature": -Infinity}', "the number -Infinity"),
    (b'{"prompt": "a", "temperature": 1e999}', "the number 1e999"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b"[" * 100_000, "nested more than 64"),
    (b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64"),
    (b'{"prompt": "\\ud83d\\ude00 \\uDE00"}', "half a character, \\ude00"),
    (b'{"\\ud83d": 1}', "half a character"),
    (b"[]", "the request is []; expected an object"),
    (b"1", "the request is 1"),
    (b'"prompt"', "expected an object"),
    (b"null", "the request is null"),
    (b"{}", "prompt is missing; expected a text, or a list"),
]


@pytest.mark.parametrize(("raw", "message"), RAW, ids=lambda value: str(value)[:20])
def test_what_is_no_request(server, raw, message):
    status, _, answer = server.request("POST", "/v1/completions", raw)
    assert (status, message in refused("/v1/completions", json.loads(answer))[0]) == (400, True)


WRONG = [
    ("/v1/completions", {"prompt": "a", "temprature": 1}, "temprature", "temprature is not known here"),
    (
        "/v1/completions",
        {"prompt": "a", "temperature": "hot"},
        "temperature",
        'is "hot"; expected a number of at least 0',
    ),
    ("/v1/completions", {"prompt": "a", "top_p": 2}, "top_p", "at least 0 and at most 1"),
    ("/v1/completions", {"prompt": "a", "n": 0}, "n", "n is 0; expected a whole number of at least 1"),
    ("/v1/completions", {"prompt": "a", "stop": [1]}, "stop[0]", "expected a text"),
    ("/v1/completions", {"prompt": "a", "stop": ""}, None, "a stop string is empty"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix", "suffix is given"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of", "expected n instead"),
    ("/v1/completions", {"prompt": [1, "a"]}, "prompt", "texts and tokens"),
    ("/v1/completions", {"prompt": [512]}, "prompt", "prompt: token ids from 512 to 512; expected 0 to 511"),
    ("/v1/completions", {"prompt": [[1], [1, 512]]}, "prompt[1]", "prompt[1]: token ids from 1 to 512"),
    ("/v1/completions", {"prompt": []}, "prompt", "a list that is not empty"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "expected the ids of tokens"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"512": 1}}, None, "token id 512"),
    (
        "/v1/completions",
        {"prompt": "a", "n": 5},
        None,
        "5 answers are asked for at once, n to each prompt; expected at most 4",
    ),
    (
        "/v1/completions",
        {"prompt": ["", *["a"] * 2000], "n": 128, "max_tokens": 600},
        None,
        "256128 answers are asked for at once",
    ),
    ("/v1/completions", {"prompt": "a", "stream_options": {}}, "stream_options", "without stream"),
    ("/v1/completions", {"prompt": "a", "json_schema": {"type": "x"}}, None, "x"),
    ("/v1/completions", {"prompt": "a", "regex": "("}, None, "regex"),
    ("/v1/completions", {"prompt": "a", "grammar": 'root ::= "'}, None, "grammar"),
    ("/v1/completions", {"prompt": "\ud800"}, None, "half a character"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 600}, None, "the context holds 512"),
    ("/v1/completions", {"prompt": "a b " * 2000}, "prompt", "do not fit: the context holds 512"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, None, "no chat template"),
    ("/v1/chat/completions", {"messages": [{"role": "robot"}]}, "messages[0].role", "one of system, developer, user"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].image_url",
        "expected of: type, text",
    ),
    ("/v1/chat/completions", {"messages": [], "top_logprobs": 2}, "messages", "a list that is not empty"),
    ("/v1/embeddings", {"input": ["a", "Once upon a time " * 400]}, "input[1]", "input[1]: "),
    ("/v1/embeddings", {"input": [1, 512]}, "input", "input: token ids from 1 to 512"),
    ("/v1/embeddings", {"input": ["a", 1]}, "input", "texts and tokens"),
    ("/v1/embeddings", {"input": "a", "dimensions": 65}, "dimensions", "expected at most 64"),
    ("/tokenize", {}, "content", "content or prompt must be given"),
    ("/detokenize", {"tokens": [512]}, None, "512 is no token id"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), WRONG, ids=str)
def test_wrong_fields_are_named(server, path, body, param, message):
    status, found = server.post(path, body)
    told, named, _ = refused(path, found)
    assert (status, named) == (400, param)
    assert message in told


TOO_MUCH = [
    ("/v1/completions", {"prompt": "a", "stop": "a" * 1001}, "stop", "a text of at most 1000 characters"),
    (
        "/v1/completions",
        {"prompt": "a", "dry_sequence_breakers": ["a" * 41]},
        "dry_sequence_breakers[0]",
        "a text of at most 40 characters",
    ),
    ("/v1/completions", {"prompt": ["a"] * 2049}, "prompt", "2049 texts; expected at most 2048"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "2049 texts; expected at most 2048"),
    ("/v1/rerank", {"query": "a", "documents": ["b"] * 2049}, "documents", "a list, 1 to 2048 of each"),
    ("/api/embed", {"model": MODEL, "input": ["a"] * 2049}, None, "a list, at most 2048 of each"),
    ("/tokenize", {"content": "a" * 1_000_001}, "content", "a text of at most 1000000 characters"),
]
"""What would keep the server from others for seconds."""


@pytest.mark.parametrize(("path", "body", "param", "message"), TOO_MUCH, ids=[case[2] for case in TOO_MUCH])
def test_more_than_is_good_for_others_is_refused(server, path, body, param, message):
    test_wrong_fields_are_named(server, path, body, param, message)


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}
CONFLICTS = [
    ({"top_logprobs": 2}, "top_logprobs", "expected logprobs: true"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differ"),
    ({"store": True}, "store", "nothing is stored"),
    ({"tool_choice": "required"}, "tool_choice", "without tools"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "decides how often"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "cannot be a call"),
    ({"tools": [TOOL] * 1001}, "tools", "at most 1000 of each"),
    ({"tools": [TOOL, TOOL]}, None, "has the name of another"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "one of text, json_object, json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema",
     "is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"contains": 1}}}}, None, "contains"),
]  # fmt: skip


@pytest.fixture(scope="module")
def chatty(smollm2_path):
    with Server(smollm2_path) as server:
        yield server
        assert "error" not in {line["level"] for line in server.log()}


@pytest.mark.parametrize(("fields", "param", "message"), CONFLICTS, ids=str)
def test_fields_that_do_not_go_together(chatty, fields, param, message):
    status, found = chatty.post("/v1/chat/completions", {**CHAT, "max_tokens": 1, **fields})
    assert status == 400
    assert message in found["error"]["message"]
    assert found["error"]["param"] == param


def test_calls_in_messages_are_checked(chatty):
    call = {"id": "1", "function": {"name": "f", "arguments": "[1]"}}
    status, found = chatty.post("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert (status, found["error"]["param"]) == (400, "messages[0].tool_calls[0].function.arguments")


FIELDS = {path: each.body.fields for each in endpoints() if each.body for path in each.paths}


def test_the_description_is_of_what_is_served(server):
    described = server.get("/openapi.json")[1]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            body = b"{" if method == "post" else None
            status, _, raw = server.request(method.upper(), path.format(name=MODEL), body)
            assert status == (403 if path in ELSEWHERE else 400 if method == "post" else 200), path
            if status != 200:
                error = operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
                jsonschema.validate(json.loads(raw), described["components"]["schemas"][error.split("/")[-1]])
            body = operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})
            jsonschema.Draft202012Validator.check_schema(body["content"]["application/json"]["schema"])
    assert all(f"/v1/{name}" in described["paths"] for name in ("chat/completions", "completions", "models/{name}"))


VALUES = [True, -1, 0, 1.5, 2**70, 1e300, "", "x", "\x00", [], [None], {}, {"a": {}}, [[1]], [{"role": 1}], ["a"] * 99]


@pytest.mark.parametrize("path", BODIES)
def test_any_value_of_any_field_is_answered_or_refused_by_name(server, path):
    for name in FIELDS[path]:
        for value in VALUES:
            body = {**BODIES[path], name: value}
            status, found = server.post(path, body)
            if not is_described(server, path, body):
                assert status == 400, (name, value)
                message, param, _ = refused(path, found)
                assert (param or message).startswith(name)
            if status == 400:
                message, param, code = refused(path, found)
                named = name in message or (param or "").startswith(name)
                assert (
                    named
                    or code in ("chat_template", "context_length_exceeded", "unsupported")
                    or (
                        # said by those who know what the field means
                        any(word in message for word in ("tokens", "stop string", "choices", "schema", "chat template"))
                    )
                ), (name, value, found)
            else:
                assert status in (200, 404), (name, value, found)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
)


def nested(inner):
    return inner | st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)


JSON = nested(nested(PLAIN))


def changed(path):
    """Any body, or one that is right but for some fields."""
    names = st.sampled_from(sorted(FIELDS[path])) | st.text(max_size=9)
    more = st.dictionaries(names, JSON, max_size=4)
    return st.tuples(st.just(path), JSON | st.builds(dict.__or__, st.just(BODIES[path]), more))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.one_of([changed(path) for path in BODIES]))
@example(("/tokenize", {"content": "Once", "unknown": None}))
def test_anything_is_answered_or_refused(server, asked):
    path, body = asked
    status, found = server.post(path, body)
    assert status == 400 or is_described(server, path, body)
    assert status in (200, 400, 404), found
    assert status == 200 or refused(path, found)


def test_a_model_that_is_not_here(server):
    status, found = server.post("/v1/completions", {**STORY, "model": "gpt-4"})
    assert (status, found["error"]["code"]) == (404, "model_not_found")
    assert server.post("/v1/completions", {**STORY, "model": None})[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/page", "/page/../run.py", "/v1", "/v1/completions/", "/v1/../../etc/passwd", "/%2e%2e/etc/passwd", "/v1/%00"],
)
def test_no_path_leads_anywhere(server, path):
    status, found = server.get(path)
    assert (status, found["error"]["type"]) == (404, "not_found_error")


def test_wrong_methods(server):
    status, headers, raw = server.request("GET", "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    assert "GET is not for /v1/completions; expected POST" in json.loads(raw)["error"]["message"]
    assert server.request("DELETE", "/health")[0] == 405


def test_large_bodies(server):
    body = b'{"prompt": "' + b"a" * 10_000_001
    status, _, raw = server.request("POST", "/v1/completions", body)
    assert (status, "at most so many" in raw.decode()) == (413, True)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw_socket:
        raw_socket.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\nx")
        assert raw_socket.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "head",
    [b"nonsense\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 100_000, b"POST /tokenize HTTP/1.1\r\n"
     b"Host: localhost\r\nContent-Length: -1\r\n\r\n"],
    ids=["no head", "no host", "a long path", "a wrong length"],
)  # fmt: skip
def test_what_is_no_http(server, head):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw_socket:
        raw_socket.sendall(head)
        assert raw_socket.recv(1000).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))


# Clients that leave, and clients that are many.


def leaving(server, body, n_bytes):
    """A connection that is closed after so many bytes of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw_socket:
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        raw_socket.sendall(head.encode() + raw)
        left = n_bytes
        while left > 0:
            left -= len(raw_socket.recv(left))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_makes_room(server, stream):
    server.post("/v1/completions", STORY)
    before = server.metric('edgellm_generated_tokens_total{model="stories260k"}')
    for _ in range(8):
        leaving(server, {**LONG, "stream": stream}, 400 if stream else 0)
        until(lambda: server.get("/ready")[1].get("answers") == 0)
    assert server.metric('edgellm_generated_tokens_total{model="stories260k"}') < before + 8 * 400
    assert server.post("/v1/completions", STORY)[0] == 200


def test_more_than_there_is_room_for(server):
    """Two slots, two that wait; the others are told to come again."""
    found = []

    def ask():
        status, headers, raw = server.request("POST", "/v1/completions", LONG)
        found.append((status, headers.get("retry-after"), json.loads(raw)))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered = [each for status, _, each in found if status == 200]
    refused = [(retry, each["error"]["type"]) for status, retry, each in found if status == 503]
    assert len(answered) + len(refused) == 12
    assert len(answered) >= 4
    assert set(refused) == {("2", "unavailable_error")}
    assert all(each["usage"]["completion_tokens"] == 500 for each in answered)
    assert server.get("/ready")[1] == {"status": "ready", "answers": 0, "room": 4, "models_loaded": 1}


def test_many_embeddings_leave_room_for_others_and_end_with_their_client(server):
    body = {"model": MODEL, "input": ["Once upon a time there was a dog. " * 8] * 2000}
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as leaves:
        raw = json.dumps(body).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        leaves.sendall(head.encode() + raw)
        until(lambda: server.get("/ready")[1]["answers"] == 1)
        assert server.post("/v1/completions", STORY)[0] == server.post("/v1/embeddings", {"input": "Once"})[0] == 200
        assert server.get("/ready")[1]["answers"] == 1
    until(lambda: server.get("/ready")[1]["answers"] == 0)


def test_an_error_in_one_answer_leaves_the_others_alone(server):
    """A grammar that turns out to be a dead end midway."""
    answers = {}

    def ask(name, body):
        answers[name] = server.post("/v1/completions", body)

    bad = {**STORY, "logit_bias": {str(id): -1e6 for id in range(512)}, "regex": "a+"}
    threads = [
        threading.Thread(target=ask, args=(name, body))
        for name, body in (("good", {**LONG, "temperature": 0}), ("bad", bad))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers["good"][1]["usage"]["completion_tokens"] == 500
    assert answers["bad"][0] in (200, 400)


def test_a_request_takes_its_time_at_most():
    with Server(MODEL, "--timeout", 0.05) as server:
        body = {**LONG, "n": 16}
        status, headers, raw = server.request("POST", "/v1/completions", body)
        assert (status, headers["x-should-retry"], b"not complete after 0.05 seconds" in raw) == (504, "false", True)
        status, _, raw = server.request("POST", "/v1/completions", {**body, "stream": True})
        *_, last = raw.decode().strip().split("\n\n")
        assert (status, json.loads(last.removeprefix("data: "))["error"]["type"]) == (200, "timeout_error")
        until(lambda: server.get("/ready")[1]["answers"] == 0)


def test_a_long_text_is_refused_before_its_tokens_are_counted(server, smollm2_path):
    text = "Once upon a time. " * 500_000
    with Server(smollm2_path, "--ctx", 512) as large:
        for path, asked in (("completions", {"prompt": text}), ("chat/completions", {"messages": [user(text)]})):
            status, found = large.post(f"/v1/{path}", asked)
            assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
            expected = r"(prompt: )?9000\d{3} characters, which are 11\d{4} tokens or more, do not fit: "
            assert re.match(expected, found["error"]["message"])
    status, found = server.post("/v1/completions", {"prompt": [1] * 1_000_000})
    assert (status, found["error"]["param"]) == (400, "prompt")
    assert "1000000 tokens do not fit: the context holds 512; s" in found["error"]["message"]


def user(text):
    return {"role": "user", "content": text}


def test_slow_clients_are_let_go():
    with Server(MODEL, before="import edgellm.server.security\nedgellm.server.security.SLOW = 0.3") as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as quiet:
            assert quiet.recv(1) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as half:
            half.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            assert half.recv(1) == b""
        assert server.get("/health") == (200, {"status": "ok", "models_loaded": 1})


def test_a_body_that_does_not_come_is_not_waited_for():
    with Server(MODEL, before="import edgellm.server.body\nedgellm.server.body.SECONDS = 0.3") as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            answer = b"".join(iter(lambda: half.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"the body did not arrive within" in answer
        assert server.post("/v1/completions", STORY)[0] == 200


def test_a_prompt_that_is_too_long(server):
    for body in ({"prompt": "a " * 600}, {"prompt": [5] * 1_000_000}, {"prompt": "a", "max_tokens": 10_000}):
        status, found = server.post("/v1/completions", body)
        assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
        assert "512" in found["error"]["message"]


def test_signs_of_life_while_nothing_else_is_told():
    """And OpenAI's client takes no notice of them."""
    before = "import edgellm.server.service\nedgellm.server.service.PING = 0.001"
    with Server(MODEL, "--backend", "reference", before=before) as server:
        body = {**STORY, "prompt": "Once upon a time " * 90, "stream": True}
        events = server.post("/v1/completions", body)[1].split("\n\n")
        assert events[0] == ": ping"
        assert events[-2:] == ["data: [DONE]", ""]
        with openai.OpenAI(base_url=server.url, api_key="none") as client:
            chunks = list(client.completions.create(**body))
        assert "".join(chunk.choices[0].text for chunk in chunks)


def test_an_error_of_the_server_stays_with_it():
    before = (
        "from edgellm.api import Model\n"
        "def broken(self, *arguments, **options): raise KeyError('plugh')\n"
        "Model.begin_ids = broken"
    )
    with Server(MODEL, before=before) as server:
        status, headers, raw = server.request("POST", "/v1/completions", STORY)
        assert (status, b"plugh" in raw, b"Traceback" in raw) == (500, False, False)
        assert headers["x-request-id"] in json.loads(raw)["error"]["message"]
        until(lambda: len(server.lines) == 2)
        error, request = server.log()
        assert error["request"] == request["request"] == headers["x-request-id"]
        assert "KeyError: 'plugh'" in error["traceback"]
        assert server.get("/ready")[1]["answers"] == 0


def test_an_error_in_a_step_of_one_answer_leaves_the_others_alone():
    before = (
        "from edgellm.answer import Answer\n"
        "follow = Answer.follow\n"
        "def broken(self, *arguments):\n"
        "    if len(self.completion.ids) == 3 and len(self.completion.prompt_ids) == 2: raise KeyError('plugh')\n"
        "    return follow(self, *arguments)\n"
        "Answer.follow = broken"
    )
    with Server(MODEL, before=before) as server:
        bodies = [LONG, {**LONG, "prompt": [1, 5]}, {**LONG, "prompt": [1, 5, 6]}]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                asked = pool.map(lambda body: server.post("/v1/completions", body), bodies)
                assert [status for status, _ in asked] == [200, 500, 200]
        assert server.get("/ready")[1]["answers"] == 0


def test_an_error_in_the_middle_of_a_stream():
    with Server(MODEL, before=BREAKS_MIDWAY) as server:
        status, text = server.post("/v1/completions", {**LONG, "stream": True})
        *told, last, end = text.split("\n\n")
        assert (status, end, len(told)) == (200, "", 5)
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["type"], "plugh" in error["message"]) == ("server_error", False)
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            stream = client.completions.create(**STORY | {"max_tokens": 20, "temperature": 1}, stream=True)
            with pytest.raises(openai.APIError, match="the server failed at request"):
                list(stream)
        until(lambda: server.get("/ready")[1]["answers"] == 0)


def test_an_error_in_the_middle_of_a_streamed_response(smollm2_path):
    before = (
        "from edgellm.answer import Answer\n"
        "follow = Answer.follow\n"
        "def broken(self, *arguments):\n"
        "    if len(self.completion.ids) == 3: raise KeyError('plugh')\n"
        "    return follow(self, *arguments)\n"
        "Answer.follow = broken"
    )
    asked = {"model": smollm2_path.stem, "input": "Hello!", "temperature": 0}
    with Server(smollm2_path, before=before) as server:
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            events = list(client.responses.create(**asked, stream=True))
            with pytest.raises(openai.InternalServerError, match="the server failed at request"):
                client.responses.create(**asked)
        last = events[-1].response
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert (events[-1].type, last.status, last.error.code) == ("response.failed", "failed", "server_error")
        assert last.error.message.startswith("the server failed at request")
        said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert (last.output_text, last.output[0].status) == (said, "incomplete")
        assert said
        assert server.get("/ready")[1]["answers"] == 0


# Who may ask.


def test_keys(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("first\n\nsecond\n")
    monkeypatch.setenv("EDGELLM_API_KEY", "third,fourth")
    with Server(MODEL, "--api-key", "fifth", "--api-key-file", file) as server:
        for key in ("first", "second", "third", "fourth", "fifth"):
            assert server.get("/v1/models", authorization=f"Bearer {key}")[0] == 200
            assert server.get("/v1/models", **{"x-api-key": key})[0] == 200
        for headers in (
            {}, {"authorization": "Bearer"}, {"authorization": "Bearer firs"}, {"authorization": "Bearer first2"},
            {"authorization": "first"}, {"authorization": "Bearer \xe9"}, {"x-api-key": ""},
        ):  # fmt: skip
            status, found = server.get("/v1/models", **headers)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert server.get("/health")[0] == server.get("/ready")[0] == 200
        assert server.post("/v1/completions", STORY)[0] == server.get("/metrics")[0] == server.get("/nothing")[0] == 401
        assert all("first" not in line and "fifth" not in line for line in server.lines)


def test_hosts_and_origins():
    with Server(MODEL, "--allow-host", "pi.local", "--allow-origin", "https://chat.example") as server:
        for host in ("localhost", "127.0.0.1:1", "[::1]:80", "192.168.0.7", "pi.local", "pi.local:8080"):
            assert server.get("/health", host=host)[0] == 200
        for host in ("evil.example", "localhost.evil.example", "", "[", "pi.local.", "127.0.0.1.evil.example"):
            status, found = server.get("/health", host=host)
            assert (status, found["error"]["type"]) == (403, "permission_error")
        status, headers, _ = server.request("GET", "/health", headers={"origin": "https://chat.example"})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://chat.example")
        asked = {"origin": "https://chat.example", "access-control-request-method": "POST",
                 "access-control-request-headers": "authorization"}  # fmt: skip
        assert server.request("OPTIONS", "/v1/completions", headers=asked)[0] == 200
        for origin in ("https://evil.example", "null", "http://["):
            status, headers, _ = server.request("POST", "/v1/completions", STORY, {"origin": origin})
            assert (status, headers.get("access-control-allow-origin")) == (403, None)
        same = f"http://127.0.0.1:{server.port}"
        assert server.post("/v1/completions", STORY, origin=same)[0] == 200


def test_a_public_address_asks_for_a_key():
    error = edgellm("serve", MODEL, "--host", "0.0.0.0", code=2).stderr
    assert "the host 0.0.0.0 can be reached from other machines, and no key is asked for" in error
    assert [is_local(host) for host in ("127.0.0.2", "::1", "localhost", "0.0.0.0", "::", "pi.local", "8.8.8.8")] == [
        *(True,) * 3, *(False,) * 4
    ]  # fmt: skip
    check_public("0.0.0.0", True, False)
    check_public("0.0.0.0", False, True)
    with pytest.raises(ArgumentError, match="expected --api-key-file"):
        check_public("::", False, False)


def test_ports_that_cannot_be_listened_at():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1 port {port} cannot be listened at" in edgellm("serve", MODEL, "--port", port, code=2).stderr
    assert "cannot be listened at" in edgellm("serve", MODEL, "--host", "192.0.2.1", "--without-key", code=2).stderr


def test_slots_that_memory_does_not_hold():
    assert "at once; expected 1 to" in edgellm("serve", MODEL, "--slots", 1000, code=2).stderr
    assert "two models are named stories260k" in edgellm("serve", MODEL, BUNDLED, code=2).stderr


def test_the_extra_is_named_where_it_is_missing(tmp_path):
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError('no', name='starlette')")
    run = edgellm("serve", MODEL, code=5, path=tmp_path)
    assert "needs the package starlette; run pip install 'edgellm[serve]'" in run.stderr


# The log, and the end.


def test_the_log_has_no_texts():
    secret = "xyzzy plugh"
    with Server(MODEL) as server:
        server.post("/v1/completions", {**STORY, "prompt": secret, "echo": True})
        server.post("/v1/completions", {**STORY, "prompt": 5, "regex": secret})
        server.get(f"/v1/models/x?q={secret.replace(' ', '+')}")
        until(lambda: len(server.lines) == 3)
        first, second, third = server.log()
        assert all("xyzzy" not in line for line in server.lines)
        assert (first["path"], first["status"], first["method"]) == ("/v1/completions", 200, "POST")
        assert (first["model"], first["generated_tokens"]) == (MODEL, 4)
        assert first["prompt_tokens"] > 1
        assert (second["status"], third["status"]) == (400, 404)


def test_the_end_waits_for_answers():
    with Server(MODEL, "--grace", 20) as server:
        found = []
        body = {**LONG, "n": 8}
        thread = threading.Thread(target=lambda: found.append(server.post("/v1/completions", body)))
        thread.start()
        until(lambda: server.get("/ready")[1]["answers"] == 8)
        assert server.end() == -signal.SIGTERM
        thread.join()
        assert [status for status, _ in found] == [200]
        assert found[0][1]["usage"]["completion_tokens"] == 8 * 500


def test_the_end_waits_no_longer_than_grace():
    with Server(MODEL, "--grace", 0, "--slots", 1) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps({**LONG, "n": 60, "stream": True}))
        response = connection.getresponse()
        response.read(100)
        begun = time.monotonic()
        assert server.end() == -signal.SIGTERM
        assert time.monotonic() - begun < 10
        connection.close()


def test_slots(server):
    free = [{"id": i, "model": MODEL, "n_ctx": 512, "is_processing": False} for i in range(2)]
    assert server.get("/slots") == server.get(f"/slots?model={MODEL}&fail_on_no_slot=1") == (200, free)
    body = {**LONG, "prompt": "xyzzy", "stream": True, "n": 3}
    thread = threading.Thread(target=server.post, args=("/v1/completions", body))
    thread.start()
    found = []
    until(lambda: found.append(server.get("/slots")[1]) or all("next_token" in slot for slot in found[-1]))
    told = [slot["next_token"] for slot in found[-1]]
    assert {each["n_decoded"] + each["n_remain"] for each in told} == {500}
    assert "xyzzy" not in json.dumps(found)
    thread.join()
    until(lambda: server.get("/slots") == (200, free))
    assert server.get("/slots?model=x")[0] == 404


def test_metrics(server):
    server.post("/v1/completions", STORY)
    text = server.get("/metrics")[1]
    assert 'edgellm_requests_total{path="/v1/completions",status="200"}' in text
    assert server.metric('edgellm_first_token_seconds_bucket{le="+Inf"}') == server.metric(
        "edgellm_first_token_seconds_count"
    )
    assert server.metric("edgellm_slots") == 2
    assert 0 < server.metric("edgellm_cache_bytes") < server.metric("edgellm_models_bytes")
