"""OpenAI's chat completions."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, Response

from edgellm.answer import Answer, Completion, Piece
from edgellm.chat import Question, question
from edgellm.server import openai
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.messages import MESSAGES, TOOLS, messages_of
from edgellm.server.schema import Either, Flag, Kind, Object, Text, Whole
from edgellm.server.service import Answers, Call
from edgellm.server.streams import PING, answering
from edgellm.thoughts import ThoughtReader, is_thought_open
from edgellm.tools import CallReader, ToolCall

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
    **openai.STRUCTURE,
    "store": Flag(),
}
STRUCTURES = ("response_format", *openai.STRUCTURE)


class Asked(NamedTuple):
    question: Question
    is_thinking: bool
    """Whether the answer begins within a thought."""
    answers: list[Answer]


def _asked(call: Call) -> Asked:
    fields, model = call.fields, call.served.model
    _check(fields)
    messages, prompt = messages_of(fields["messages"]), call.served.prompt()
    asked = question(model, prompt, messages, fields.get("tools", ()), _choice(fields))
    options = {**openai.options(fields), **_structure(fields)}
    if asked.grammar:
        options["grammar"] = asked.grammar
    if "max_completion_tokens" in fields:
        options["max_tokens"] = fields["max_completion_tokens"]
    if fields.get("logprobs"):
        options["logprobs"] = fields.get("top_logprobs", 0)
    each = openai.each_seed(options, fields.get("n", 1))
    return Asked(asked, is_thought_open(prompt.text), [model.begin_ids(asked.ids, **options) for options in each])


def _check(fields: dict[str, Any]) -> None:
    """What is wrong only together with others."""
    openai.check_stream_options(fields)
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        raise RequestError("top_logprobs is given without logprobs; expected logprobs: true", param="top_logprobs")
    both = "max_tokens" in fields and "max_completion_tokens" in fields
    if both and fields["max_tokens"] != fields["max_completion_tokens"]:
        raise RequestError("max_tokens and max_completion_tokens differ; expected one of them", param="max_tokens")
    if fields.get("store"):
        raise RequestError("store is true, but nothing is stored here; expected false", param="store")
    if fields.get("tool_choice", "none") != "none" and not fields.get("tools"):
        raise RequestError("tool_choice is given without tools; expected some tools", param="tool_choice")
    if not fields.get("tools") or _choice(fields) == "none":
        return
    if fields.get("parallel_tool_calls") is False and _choice(fields) == "auto":
        raise RequestError(
            "parallel_tool_calls is false, but a model that may call decides how often; expected a tool_choice that "
            "asks for one call, or true",
            param="parallel_tool_calls",
        )
    if given := [name for name in STRUCTURES if name in fields and fields[name] != {"type": "text"}]:
        raise RequestError(
            f"{given[0]} and tools are both given, but what must be so cannot be a call; expected one of them, or "
            "tool_choice none",
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


class _Reader:
    """One answer, as it comes -> what is new in its message: thoughts, text, calls."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._thoughts = asked.question, ThoughtReader(asked.is_thinking)
        self._calls = CallReader(self._asked.style) if self._asked.style else None

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        return self._deltas(self._thoughts.push(self._asked.text(piece)))

    def finish(self, completion: Completion) -> tuple[list[dict[str, Any]], str]:
        """What is left, and why the answer ends."""
        deltas = self._deltas(self._thoughts.finish())
        reason = completion.finish_reason
        if self._calls is None:
            return deltas, reason
        rest, calls = self._calls.finish()
        deltas += [{"content": rest}] if rest else []
        deltas += [{"tool_calls": [_call(i, each) for i, each in enumerate(calls)]}] if calls else []
        return deltas, "tool_calls" if calls and reason == "stop" else reason

    def _deltas(self, parts: Any) -> list[dict[str, Any]]:
        found = []
        for is_thought, text in parts:
            shown = text if is_thought or self._calls is None else self._calls.push(text)
            if shown:
                found.append({"reasoning_content" if is_thought else "content": shown})
        return found


def _call(index: int, call: ToolCall) -> dict[str, Any]:
    # Nine letters or digits: the templates of Mistral take no other.
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"index": index, "id": f"call{secrets.token_hex(3)[:5]}", "type": "function", "function": function}


async def _whole(call: Call, asked: Asked, answers: Answers) -> Response:
    readers = [_Reader(asked) for _ in asked.answers]
    deltas: list[list[dict[str, Any]]] = [[] for _ in readers]
    reasons = [""] * len(readers)
    async for told in answers.events():
        if told is None:
            continue
        which, event_ = told
        if isinstance(event_, Piece):
            deltas[which] += readers[which].push(event_)
        else:
            rest, reasons[which] = readers[which].finish(event_)
            deltas[which] += rest
    choices = [
        {
            "index": i,
            "message": _message(deltas[i]),
            "logprobs": _logprobs(call, asked.answers[i].completion, 0, len(asked.answers[i].completion.ids)),
            "finish_reason": reasons[i],
        }
        for i in range(len(readers))
    ]
    return JSONResponse(
        {
            **openai.head("chat.completion", "chatcmpl", call.served),
            "choices": choices,
            "usage": _usage(asked),
        }
    )


def _message(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    texts = {name: "".join(delta.get(name, "") for delta in deltas) for name in ("content", "reasoning_content")}
    calls = [
        {name: value for name, value in each.items() if name != "index"}
        for delta in deltas
        for each in delta.get("tool_calls", ())
    ]
    message: dict[str, Any] = {"role": "assistant", "content": texts["content"] or (None if calls else "")}
    message["refusal"] = None
    if texts["reasoning_content"]:
        message["reasoning_content"] = texts["reasoning_content"]
    if calls:
        message["tool_calls"] = calls
    return message


async def _chunks(call: Call, asked: Asked, answers: Answers) -> AsyncGenerator[bytes, None]:
    chunks = openai.Chunks(call, "chat.completion.chunk", "chatcmpl")
    readers, n_told = [_Reader(asked) for _ in asked.answers], [0] * len(asked.answers)

    def chunk(which: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        return chunks.of({"index": which, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    for which in range(len(readers)):
        yield chunk(which, {"role": "assistant", "content": ""})
    async for told in answers.events():
        if told is None:
            yield PING
            continue
        which, event_ = told
        if isinstance(event_, Piece):
            n = n_told[which] + (event_.id is not None)
            logprobs = _logprobs(call, asked.answers[which].completion, n_told[which], n)
            n_told[which] = n
            deltas = readers[which].push(event_) or ([{"content": ""}] if logprobs else [])
            for i, delta in enumerate(deltas):
                yield chunk(which, delta, None if i else logprobs)
        else:
            deltas, reason = readers[which].finish(event_)
            for delta in deltas:
                yield chunk(which, delta)
            yield chunk(which, {}, reason=reason)
    yield chunks.end(_usage(asked))


def _logprobs(call: Call, done: Completion, begin: int, end: int) -> dict[str, Any] | None:
    """Of some of an answer's tokens."""
    if not call.fields.get("logprobs") or begin == end:
        return None
    return openai.chat_logprobs(call.served.model.tokenizer, done.logprobs[begin:end])


def _usage(asked: Asked) -> dict[str, Any]:
    return openai.usage(asked.answers, [asked.answers[0].completion])


PATHS = ("/v1/chat/completions", "/chat/completions")
ENDPOINTS = [Endpoint("POST", PATHS, answering(_asked, _whole, _chunks), Object(FIELDS, ["messages"]))]
