"""OpenAI's responses: a turn of a conversation as a list of items. Nothing is stored between them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.responses import JSONResponse, Response

from edgellm.sampling import DEFAULTS
from edgellm.server import openai, turn
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.log import told
from edgellm.server.messages import MOST_TOOLS, arguments_of
from edgellm.server.schema import Anything, Either, Flag, Kind, ListOf, MapOf, Object, Tagged, Text, Whole
from edgellm.server.service import Answers, Call
from edgellm.server.streams import PING, answering
from edgellm.server.streams import event as unnamed
from edgellm.server.turn import Asked, Called, End, Part

LOGPROBS = "message.output_text.logprobs"
ROLES = ("system", "developer", "user", "assistant")
ABOUT: dict[str, Kind] = {"id": Text(), "status": Text()}
"""What an item that the server has made has besides; it says nothing to the model."""
PART = Tagged(
    {
        "input_text": Object({"text": Text()}, ["text"]),
        "output_text": Object({"text": Text(), "annotations": Anything(), "logprobs": Anything()}, ["text"]),
        "refusal": Object({"refusal": Text()}, ["refusal"]),
    }
)
THOUGHT = Tagged(
    {"reasoning_text": Object({"text": Text()}, ["text"]), "summary_text": Object({"text": Text()}, ["text"])}
)
ITEM = Tagged(
    {
        "message": Object(
            {**ABOUT, "role": Text(ROLES), "content": Either((Text(), ListOf(PART)))}, ["role", "content"]
        ),
        "function_call": Object(
            {**ABOUT, "call_id": Text(), "name": Text(), "arguments": Text()}, ["call_id", "name", "arguments"]
        ),
        "function_call_output": Object(
            {**ABOUT, "call_id": Text(), "output": Either((Text(), ListOf(PART)))}, ["call_id", "output"]
        ),
        "reasoning": Object(
            {**ABOUT, "summary": ListOf(THOUGHT), "content": ListOf(THOUGHT), "encrypted_content": Text()}
        ),
    },
    default="message",
)
TOOL = Tagged(
    {
        "function": Object(
            {"name": Text(), "description": Text(), "parameters": MapOf(Anything()), "strict": Flag()}, ["name"]
        )
    }
)
FORMAT = Tagged(
    {
        "text": Object({}),
        "json_object": Object({}),
        "json_schema": Object(
            {"name": Text(), "description": Text(), "schema": openai.JSON_SCHEMA, "strict": Flag()}, ["schema"]
        ),
    }
)
CHOICES = ("none", "auto", "required")
UNSTORED = ("previous_response_id", "conversation", "prompt")
"""Fields that mean something which was stored."""
FIELDS: dict[str, Kind] = {
    "input": Either((Text(), ListOf(ITEM, least=1))),
    "instructions": Text(),
    **{name: kind for name, kind in openai.COMMON.items() if name not in ("n", "max_tokens", "stream_options")},
    "max_output_tokens": Whole(1),
    "stream_options": Object({"include_obfuscation": Flag()}),
    "text": Object({"format": FORMAT, "verbosity": Text(("medium",))}),
    "tools": ListOf(TOOL, most=MOST_TOOLS),
    "tool_choice": Either((Text(CHOICES), Tagged({"function": Object({"name": Text()}, ["name"])}))),
    "parallel_tool_calls": Flag(),
    "include": ListOf(Text((LOGPROBS,))),
    "top_logprobs": Whole(0, openai.MOST_TOP),
    "truncation": Text(("disabled",)),
    "background": Flag(),
    "store": Flag(),
    **dict.fromkeys(UNSTORED, Anything()),
}


def _asked(call: Call) -> Asked:
    fields = call.fields
    _check(fields)
    options = {**openai.options(fields), **_structure(fields)}
    if "max_output_tokens" in fields:
        options["max_tokens"] = fields["max_output_tokens"]
    if _has_logprobs(fields):
        options["logprobs"] = fields.get("top_logprobs", 0)
    tools = [{"type": "function", "function": _without_type(tool)} for tool in fields.get("tools", ())]
    return turn.ask(call, turn.prompt(call, _messages(fields), tools=tools, tool_choice=_choice(fields)), options)


def _without_type(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "type"}


def _check(fields: dict[str, Any]) -> None:
    """What cannot be had, and what is wrong only together with others."""
    for name in UNSTORED:
        if name in fields:
            raise RequestError(
                f"{name} is given, but nothing is stored here; expected the whole conversation as input", param=name
            )
    for name in ("store", "background"):
        if fields.get(name):
            raise RequestError(f"{name} is true, but nothing is stored here; expected false", param=name)
    formats = [] if _format(fields)["type"] == "text" else ["text"]
    openai.check_tools(fields, _choice(fields), [*formats, *openai.structure(fields)])
    if "top_logprobs" in fields and not _has_logprobs(fields):
        raise RequestError(f"top_logprobs is given; expected {LOGPROBS} in include too", param="top_logprobs")


def _has_logprobs(fields: dict[str, Any]) -> bool:
    return LOGPROBS in fields.get("include", ())


def _format(fields: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = fields.get("text", {}).get("format", {"type": "text"})
    return given


def _structure(fields: dict[str, Any]) -> dict[str, Any]:
    """What an answer must be, as Model.stream has it."""
    given, format_ = openai.structure(fields), _format(fields)
    if format_["type"] != "text":
        given["json_schema"] = format_.get("schema", {"type": "object"})
    return given


def _choice(fields: dict[str, Any]) -> str:
    choice = fields.get("tool_choice", "auto")
    return choice if isinstance(choice, str) else str(choice["name"])


# Items of a request -> messages of a chat.


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    given = fields["input"]
    items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
    messages = [{"role": "system", "content": fields["instructions"]}] if "instructions" in fields else []
    for i, item in enumerate(items):
        _add(messages, item, f"input[{i}]")
    return [message for message in messages if message.pop("is_said", True)]


def _add(messages: list[dict[str, Any]], item: dict[str, Any], at: str) -> None:
    """What an assistant thinks, says and calls one after the other is one message."""
    type_ = item["type"]
    if type_ == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
    elif type_ == "message" and item["role"] != "assistant":
        # Templates know no developer, who is the system of newer models.
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": _text(item["content"])})
    else:
        _add_said(_last_of_assistant(messages, type_), item, at)


def _last_of_assistant(messages: list[dict[str, Any]], type_: str) -> dict[str, Any]:
    last = messages[-1] if messages else {}
    is_open = last.get("role") == "assistant" and (type_ == "function_call" or not last["is_said"])
    if not is_open:
        messages.append({"role": "assistant", "content": "", "is_said": False})
    return messages[-1]


def _add_said(message: dict[str, Any], item: dict[str, Any], at: str) -> None:
    if item["type"] == "reasoning":
        message["reasoning_content"] = message.get("reasoning_content", "") + _text(item.get("content", ()))
        return
    message["is_said"] = True
    if item["type"] == "message":
        message["content"] = _text(item["content"])
    else:
        function = {"name": item["name"], "arguments": arguments_of(item["arguments"], f"{at}.arguments")}
        call = {"type": "function", "id": item["call_id"], "function": function}
        message["tool_calls"] = [*message.get("tool_calls", ()), call]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text", part.get("refusal")) for part in content)


# An answer -> items, whole or as they come.


class _Writer:
    """The items of a response; each step of them is told as an event."""

    def __init__(self, call: Call, asked: Asked) -> None:
        self._call, self._done = call, asked.answers[0].completion
        self._id, self._created = f"resp_{secrets.token_hex(24)}", int(time.time())
        self._n_events = self._n_told = self._n_new = self._n_thought = 0
        self._items: list[dict[str, Any]] = []
        self._is_open = False

    def begin(self) -> Iterator[dict[str, Any]]:
        for type_ in ("response.created", "response.in_progress"):
            yield self._event(type_, response=self.response("in_progress"))

    def push(self, parts: list[Part], n_tokens: int) -> Iterator[dict[str, Any]]:
        """Tokens that brought no part belong to the next."""
        self._n_new += n_tokens
        if not parts:
            return
        begin, self._n_told, self._n_new = self._n_told, self._n_told + self._n_new, 0
        self._n_thought += (self._n_told - begin) * parts[0].is_thought
        logprobs = self._logprobs(begin, self._n_told)
        for part in parts:
            type_ = "reasoning" if part.is_thought else "message"
            if not self._is_open or self._items[-1]["type"] != type_:
                yield from self._close("completed")
                yield from self._open(type_)
            yield from self._grow(part.text, logprobs)
            logprobs = []

    def finish(self, end: End) -> Iterator[dict[str, Any]]:
        """The parts of the end are pushed before."""
        status = "incomplete" if end.reason == "length" else "completed"
        if not self._is_open and not end.calls and not any(item["type"] == "message" for item in self._items):
            yield from self._open("message")
        yield from self._close(status)
        for called in end.calls:
            yield from self._called(called)
        yield self._event(f"response.{status}", response=self.response(status))

    def fail(self, error: RequestError) -> dict[str, Any]:
        """What is open stays as far as it came."""
        if self._is_open:
            self._items[-1]["status"] = "incomplete"
        code = "invalid_prompt" if error.status < 500 else "server_error"
        failed = {**self.response("failed"), "error": {"code": code, "message": str(error)}}
        return self._event("response.failed", response=failed)

    def _open(self, type_: str) -> Iterator[dict[str, Any]]:
        prefix = "rs" if type_ == "reasoning" else "msg"
        item: dict[str, Any] = {"id": f"{prefix}_{secrets.token_hex(24)}", "type": type_, "status": "in_progress"}
        if type_ == "reasoning":
            item["summary"] = []
        else:
            item["role"] = "assistant"
        self._items.append({**item, "content": []})
        self._is_open = True
        yield self._of_item("response.output_item.added", item=self._items[-1])
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if type_ == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items[-1]["content"].append(part)
        yield self._of_part("response.content_part.added", part=part)

    def _grow(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        part = self._items[-1]["content"][0]
        part["text"] += text
        more = {}
        if part["type"] == "output_text":
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        yield self._of_part(f"response.{part['type']}.delta", delta=text, **more)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._is_open:
            return
        self._is_open, self._items[-1]["status"] = False, status
        part = self._items[-1]["content"][0]
        more = {"logprobs": part["logprobs"]} if part["type"] == "output_text" else {}
        yield self._of_part(f"response.{part['type']}.done", text=part["text"], **more)
        yield self._of_part("response.content_part.done", part=part)
        yield self._of_item("response.output_item.done", item=self._items[-1])

    def _called(self, called: Called) -> Iterator[dict[str, Any]]:
        arguments = json.dumps(called.call.arguments, ensure_ascii=False)
        item = {
            "id": f"fc_{secrets.token_hex(24)}", "type": "function_call", "call_id": called.id,
            "name": called.call.name, "arguments": arguments, "status": "completed",
        }  # fmt: skip
        self._items.append(item)
        at = {"item_id": item["id"], "output_index": len(self._items) - 1}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._of_item("response.output_item.added", item=begun)
        yield self._event("response.function_call_arguments.delta", **at, delta=arguments)
        yield self._event("response.function_call_arguments.done", **at, arguments=arguments)
        yield self._of_item("response.output_item.done", item=item)

    def _of_part(self, type_: str, **more: Any) -> dict[str, Any]:
        at = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}
        return self._event(type_, **at, **more)

    def _of_item(self, type_: str, item: dict[str, Any]) -> dict[str, Any]:
        return self._event(type_, output_index=len(self._items) - 1, item=item)

    def _event(self, type_: str, **more: Any) -> dict[str, Any]:
        number, self._n_events = self._n_events, self._n_events + 1
        return {"type": type_, "sequence_number": number, **more}

    def _logprobs(self, begin: int, end: int) -> list[dict[str, Any]]:
        if not _has_logprobs(self._call.fields):
            return []
        found = openai.chat_logprobs(self._call.served.model.tokenizer, self._done.logprobs[begin:end])
        content: list[dict[str, Any]] = found["content"]
        return content

    def response(self, status: str) -> dict[str, Any]:
        fields = self._call.fields
        is_over = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._call.served.name,
            "output": list(self._items),
            "usage": self._usage() if is_over else None,
            "instructions": fields.get("instructions"),
            "max_output_tokens": fields.get("max_output_tokens"),
            "metadata": fields.get("metadata", {}),
            "parallel_tool_calls": fields.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "background": False,
            **{name: fields.get(name, DEFAULTS[name]) for name in ("temperature", "top_p")},
            "text": {"format": _format(fields)},
            "tool_choice": fields.get("tool_choice", "auto"),
            "tools": fields.get("tools", []),
            "top_logprobs": fields.get("top_logprobs", 0),
            "truncation": "disabled",
            "user": fields.get("user"),
        }

    def _usage(self) -> dict[str, Any]:
        timings = self._done.timings
        return {
            "input_tokens": timings.prompt_tokens,
            "input_tokens_details": {"cached_tokens": timings.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": timings.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": self._n_thought},
            "total_tokens": timings.prompt_tokens + timings.generated_tokens,
        }


async def _events(writer: _Writer, asked: Asked, answers: Answers) -> AsyncGenerator[dict[str, Any] | None, None]:
    """What happens, and None as a sign of life; the last event has all of the response."""
    for event in writer.begin():
        yield event
    async for news in turn.told(asked, answers):
        if news is None:
            yield None
            continue
        for event in writer.push(news.parts, news.n_tokens):
            yield event
        if news.end:
            for event in writer.finish(news.end):
                yield event


async def _whole(call: Call, asked: Asked, answers: Answers) -> Response:
    last: dict[str, Any] = {}
    async for event in _events(_Writer(call, asked), asked, answers):
        last = event or last
    return JSONResponse(last["response"])


async def _chunks(call: Call, asked: Asked, answers: Answers) -> AsyncGenerator[bytes, None]:
    writer = _Writer(call, asked)
    try:
        async for event in _events(writer, asked, answers):
            yield PING if event is None else _named(event)
    except Exception as error:
        yield _named(writer.fail(told(error, call.notes)))


def _named(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + unnamed(event)


ENDPOINTS = [
    Endpoint("POST", ("/v1/responses", "/responses"), answering(_asked, _whole, _chunks), Object(FIELDS, ["input"]))
]
