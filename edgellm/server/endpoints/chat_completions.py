"""OpenAI's chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from edgellm.answer import Completion
from edgellm.server import openai, turn
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.messages import MESSAGES, TOOLS, messages_of
from edgellm.server.schema import Either, Flag, Kind, Object, Text, Whole
from edgellm.server.service import Answers, Call
from edgellm.server.streams import PING, answering
from edgellm.server.turn import Asked, Called, News, Said

SCHEMA = Object({"name": Text(), "description": Text(), "schema": openai.JSON_SCHEMA, "strict": Flag()}, ["schema"])
FIELDS: dict[str, Kind] = {
    "messages": MESSAGES,
    **openai.COMMON,
    "max_completion_tokens": Whole(0),
    "logprobs": Flag(),
    "top_logprobs": Whole(0, openai.MOST_TOP),
    "response_format": Object(
        {
            "type": Text(("text", "json_object", "json_schema")),
            "json_schema": SCHEMA,
            "schema": openai.JSON_SCHEMA,
        },
        ["type"],
    ),
    "tools": TOOLS,
    "tool_choice": Either(
        (
            Text(("none", "auto", "required")),
            Object({"type": Text(("function",)), "function": Object({"name": Text()}, ["name"])}, ["function"]),
        )
    ),
    "parallel_tool_calls": Flag(),
    "continue_final_message": Flag(),
    **openai.STRUCTURE,
    "store": Flag(),
}
STRUCTURES = ("response_format", *openai.STRUCTURE)


def _asked(call: Call) -> Asked:
    fields = call.fields
    _check(fields)
    options = {**openai.options(fields), **_structure(fields)}
    if "max_completion_tokens" in fields:
        options["max_tokens"] = fields["max_completion_tokens"]
    if fields.get("logprobs"):
        options["logprobs"] = fields.get("top_logprobs", 0)
    messages, tools = messages_of(fields["messages"]), fields.get("tools", ())
    begun = messages.pop() if fields.get("continue_final_message") else None
    prompt = turn.prompt(call, messages, begun=begun, tools=tools, tool_choice=_choice(fields))
    return turn.ask(call, prompt, options, n=fields.get("n", 1))


def _check(fields: dict[str, Any]) -> None:
    """What is wrong only together with others."""
    openai.check_stream_options(fields)
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        raise RequestError("top_logprobs is given without logprobs; expected logprobs: true", param="top_logprobs")
    both = "max_tokens" in fields and "max_completion_tokens" in fields
    if both and fields["max_tokens"] != fields["max_completion_tokens"]:
        raise RequestError("max_tokens and max_completion_tokens differ; expected one of them", param="max_tokens")
    if fields.get("continue_final_message"):
        _check_begun(fields)
    if fields.get("store"):
        raise RequestError("store is true, but nothing is stored here; expected false", param="store")
    structures = [name for name in STRUCTURES if name in fields and fields[name] != {"type": "text"}]
    openai.check_tools(fields, _choice(fields), structures)


def _check_begun(fields: dict[str, Any]) -> None:
    """That there is an answer to go on with, and that it can be a text only."""
    last = fields["messages"][-1]
    if last["role"] != "assistant" or last.get("tool_calls") or len(fields["messages"]) < 2:
        raise RequestError(
            "continue_final_message is true, but messages do not end with an answer to go on with; expected a last "
            "message of the assistant, of text",
            param="continue_final_message",
        )
    if given := [name for name in ("tools", *STRUCTURES) if fields.get(name)]:
        raise RequestError(
            f"continue_final_message and {given[0]} are both given, but what an answer must be holds from its "
            "beginning; expected one of them",
            param=given[0],
        )


def _choice(fields: dict[str, Any]) -> str:
    choice = fields.get("tool_choice", "auto")
    return choice if isinstance(choice, str) else str(choice["function"]["name"])


def _structure(fields: dict[str, Any]) -> dict[str, Any]:
    """What an answer must be, as Model.stream has it."""
    given = openai.structure(fields)
    format_ = fields.get("response_format", {"type": "text"})
    if format_["type"] == "json_schema":
        if "json_schema" not in format_:
            raise RequestError(
                "response_format.json_schema is missing; expected an object with a schema",
                param="response_format.json_schema",
            )
        given["json_schema"] = format_["json_schema"]["schema"]
    elif format_["type"] == "json_object":
        given["json_schema"] = format_.get("schema", {"type": "object"})
    return given


async def _whole(call: Call, asked: Asked, answers: Answers) -> Response:
    choices = [
        {
            "index": i,
            "message": _message(said),
            "logprobs": _logprobs(call, done, 0, len(done.ids)),
            "finish_reason": said.reason,
        }
        for i, (said, done) in enumerate(zip(await turn.said(asked, answers), _dones(asked), strict=True))
    ]
    head = openai.head("chat.completion", "chatcmpl", call.served)
    return JSONResponse({**head, "choices": choices, "usage": _usage(asked)})


def _message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.text or (None if said.calls else "")}
    message["refusal"] = None
    if said.thoughts:
        message["reasoning_content"] = said.thoughts
    if said.calls:
        message["tool_calls"] = [_call(each) for each in said.calls]
    return message


def _call(called: Called) -> dict[str, Any]:
    function = {"name": called.call.name, "arguments": json.dumps(called.call.arguments, ensure_ascii=False)}
    return {"id": called.id, "type": "function", "function": function}


async def _chunks(call: Call, asked: Asked, answers: Answers) -> AsyncGenerator[bytes, None]:
    chunks = openai.Chunks(call, "chat.completion.chunk", "chatcmpl")
    dones, n_told = _dones(asked), [0] * len(asked.answers)

    def chunk(which: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        return chunks.of({"index": which, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    for which in range(len(dones)):
        yield chunk(which, {"role": "assistant", "content": ""})
    async for news in turn.told(asked, answers):
        if news is None:
            yield PING
            continue
        which, n = news.which, n_told[news.which] + news.n_tokens
        logprobs = _logprobs(call, dones[which], n_told[which], n)
        n_told[which] = n
        for i, delta in enumerate(_deltas(news) or ([{"content": ""}] if logprobs else [])):
            yield chunk(which, delta, None if i else logprobs)
        if news.end:
            yield chunk(which, {}, reason=news.end.reason)
    yield chunks.end(_usage(asked))


def _deltas(news: News) -> list[dict[str, Any]]:
    """What is new in a message."""
    deltas: list[dict[str, Any]] = [
        {"reasoning_content" if part.is_thought else "content": part.text} for part in news.parts
    ]
    if news.end and news.end.calls:
        deltas.append({"tool_calls": [{"index": i, **_call(each)} for i, each in enumerate(news.end.calls)]})
    return deltas


def _dones(asked: Asked) -> list[Completion]:
    return [answer.completion for answer in asked.answers]


def _logprobs(call: Call, done: Completion, begin: int, end: int) -> dict[str, Any] | None:
    """Of some of an answer's tokens."""
    if not call.fields.get("logprobs") or begin == end:
        return None
    return openai.chat_logprobs(call.served.model.tokenizer, done.logprobs[begin:end])


def _usage(asked: Asked) -> dict[str, Any]:
    return openai.usage(asked.answers, _dones(asked)[:1])


PATHS = ("/v1/chat/completions", "/chat/completions")
ENDPOINTS = [Endpoint("POST", PATHS, answering(_asked, _whole, _chunks), Object(FIELDS, ["messages"]))]
