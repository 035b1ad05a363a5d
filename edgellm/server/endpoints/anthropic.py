"""Anthropic's messages."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from itertools import groupby
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from edgellm.server import openai, turn
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError, anthropic
from edgellm.server.messages import MOST_TOOLS
from edgellm.server.schema import Anything, Either, Flag, Kind, ListOf, MapOf, Object, Tagged, Text, Whole
from edgellm.server.service import Answers, Call
from edgellm.server.streams import Wire, answering, event
from edgellm.server.turn import Asked, Called, Part, Prompt, Said

# What a prompt has in common with others is kept without being asked for.
CACHE: dict[str, Kind] = {"cache_control": Object({"type": Text(("ephemeral",)), "ttl": Text()}, ["type"])}
TEXT = Object({"text": Text(), "citations": ListOf(Anything()), **CACHE}, ["text"])
TEXTS = Either((Text(), ListOf(Tagged({"text": TEXT}))))
BLOCK = Tagged(
    {
        "text": TEXT,
        "thinking": Object({"thinking": Text(), "signature": Text()}, ["thinking"]),
        "tool_use": Object(
            {"id": Text(), "name": Text(), "input": MapOf(Anything()), **CACHE}, ["id", "name", "input"]
        ),
        "tool_result": Object({"tool_use_id": Text(), "content": TEXTS, "is_error": Flag(), **CACHE}, ["tool_use_id"]),
    }
)
ALLOWED = {"system": ("text",), "user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}
MESSAGE = Object({"role": Text(tuple(ALLOWED)), "content": Either((Text(), ListOf(BLOCK)))}, ["role", "content"])
TOOL = Object(
    {
        "name": Text(),
        "description": Text(),
        "input_schema": MapOf(Anything()),
        "strict": Flag(),
        "eager_input_streaming": Flag(),
        **CACHE,
    },
    ["name", "input_schema"],
)
ONCE = {"disable_parallel_tool_use": Flag()}
SHOWN = {"display": Text(("summarized",))}
PROMPT: dict[str, Kind] = {
    "model": Text(),
    "messages": ListOf(MESSAGE, least=1),
    "system": TEXTS,
    "tools": ListOf(Tagged({"custom": TOOL}, default="custom"), most=MOST_TOOLS),
    "tool_choice": Tagged(
        {
            "auto": Object(ONCE),
            "any": Object(ONCE),
            "tool": Object({"name": Text(), **ONCE}, ["name"]),
            "none": Object({}),
        }
    ),
    "thinking": Tagged(
        {"enabled": Object({"budget_tokens": Whole(1), **SHOWN}), "disabled": Object({}), "adaptive": Object(SHOWN)}
    ),
    "output_config": Object({"format": Tagged({"json_schema": Object({"schema": openai.JSON_SCHEMA}, ["schema"])})}),
    **CACHE,
}
FIELDS: dict[str, Kind] = {
    **PROMPT,
    "max_tokens": Whole(1),
    "stop_sequences": ListOf(openai.STOP, most=64),
    "stream": Flag(),
    **openai.SAMPLING,
    **openai.STRUCTURE,
    # About the client; nothing is kept of them.
    "metadata": MapOf(Anything()),
    "service_tier": Text(("auto", "standard_only")),
}
THINKS = {"enabled": True, "disabled": False}
AUTO = {"type": "auto"}
STOP_REASONS = {"tool_calls": "tool_use", "stop": "end_turn"}


def _asked(call: Call) -> Asked:
    fields = call.fields
    options = {**openai.options({**fields, "stop": fields.get("stop_sequences", [])}), **openai.structure(fields)}
    if "format" in fields.get("output_config", {}):
        options["json_schema"] = fields["output_config"]["format"]["schema"]
    return turn.ask(call, _prompt(call), options, most=call.served.model.context_length)


def _prompt(call: Call) -> Prompt:
    fields = call.fields
    _check(fields)
    messages = _messages(fields)
    begun = messages.pop() if messages[-1]["role"] == "assistant" else None
    tools = [_tool(each) for each in fields.get("tools", ())]
    thinks = THINKS.get(fields.get("thinking", {}).get("type"))
    return turn.prompt(call, messages, begun=begun, tools=tools, tool_choice=_choice(fields), thinks=thinks)


def _tool(given: dict[str, Any]) -> dict[str, Any]:
    function = {name: given[name] for name in ("name", "description", "strict") if name in given}
    return {"type": "function", "function": {**function, "parameters": given["input_schema"]}}


def _choice(fields: dict[str, Any]) -> str:
    choice = fields.get("tool_choice", AUTO)
    return str(choice.get("name", {"any": "required"}.get(choice["type"], choice["type"])))


def _check(fields: dict[str, Any]) -> None:
    """What is wrong only together with others."""
    choice = fields.get("tool_choice", AUTO)
    if "tool_choice" in fields and choice["type"] != "none" and not fields.get("tools"):
        raise RequestError("tool_choice is given without tools; expected some tools")
    if choice["type"] == "auto" and choice.get("disable_parallel_tool_use"):
        raise RequestError(
            "tool_choice.disable_parallel_tool_use is true, but a model that may call decides how often; expected a "
            "tool_choice of any or tool, or false"
        )
    is_formed = "format" in fields.get("output_config", {}) or openai.structure(fields)
    is_begun = fields["messages"][-1]["role"] == "assistant"
    if is_begun and (is_formed or choice["type"] in ("any", "tool")):
        raise RequestError(
            "the last message is the beginning of an answer, but what it must be holds from its beginning; expected a "
            "last message of the user"
        )
    if is_formed and fields.get("tools") and choice["type"] != "none":
        raise RequestError(
            "a form of the answer and tools are both given, but what must be so cannot be a call; expected one of "
            "them, or a tool_choice of none"
        )


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """As chat templates want to see them."""
    found = [{"role": "system", "content": _text(fields["system"])}] if "system" in fields else []
    names: dict[str, str] = {}
    for i, message in enumerate(fields["messages"]):
        blocks, at = _blocks(message["content"]), f"messages[{i}]"
        for j, block in enumerate(blocks):
            if block["type"] not in ALLOWED[message["role"]]:
                raise RequestError(
                    f"{at}.content[{j}] is a {block['type']} of the {message['role']}; expected one of "
                    f"{', '.join(ALLOWED[message['role']])}"
                )
        if message["role"] == "assistant":
            found.append(_said(blocks, names))
        else:
            found += _given(message["role"], blocks, names)
    if "tool_calls" in found[-1]:
        raise RequestError("the last message has calls; expected their tool_result blocks after it")
    return found


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(content: Any, name: str = "text") -> str:
    return "\n".join(block[name] for block in _blocks(content) if block["type"] == name)


def _said(blocks: list[dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    """A message of the model's own; the names of its calls go to `names`, by their ids."""
    message: dict[str, Any] = {"role": "assistant", "content": _text(blocks)}
    if thoughts := _text(blocks, "thinking"):
        message["reasoning_content"] = thoughts
    if calls := [block for block in blocks if block["type"] == "tool_use"]:
        names |= {call["id"]: call["name"] for call in calls}
        message["tool_calls"] = [
            {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["input"]}}
            for call in calls
        ]
    return message


def _given(role: str, blocks: list[dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    """Messages to the model: a result of a call is one of its own."""
    found: list[dict[str, Any]] = []
    for type_, some in groupby(blocks, key=lambda block: str(block["type"])):
        if type_ == "text":
            found.append({"role": role, "content": _text(list(some))})
        else:
            found += [_result(block, names) for block in some]
    return found or [{"role": role, "content": ""}]


def _result(block: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    id, text = block["tool_use_id"], _text(block.get("content", ""))
    if id not in names:
        raise RequestError(f"there is a tool_result of {id[:60]!r}, but no tool_use before it; expected one")
    error = "Error: " if block.get("is_error") else ""
    return {"role": "tool", "tool_call_id": id, "name": names[id], "content": error + text}


async def _whole(call: Call, asked: Asked, answers: Answers) -> Response:
    (said,) = await turn.said(asked, answers)
    message = {**_head(call), "content": _content(said), **_stop(call, asked, said.reason)}
    return JSONResponse({**message, "usage": _usage(asked)})


def _head(call: Call) -> dict[str, Any]:
    id = f"msg_{secrets.token_hex(12)}"
    return {"id": id, "type": "message", "role": "assistant", "model": call.served.name}


def _content(said: Said) -> list[dict[str, Any]]:
    parts = [Part(True, said.thoughts), Part(False, said.text)]
    return [*(_block(*part) for part in parts if part.text), *(_use(each, each.call.arguments) for each in said.calls)]


def _block(is_thought: bool, text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""} if is_thought else {"type": "text", "text": text}


def _use(called: Called, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": called.id, "name": called.call.name, "input": arguments}


def _stop(call: Call, asked: Asked, reason: str) -> dict[str, Any]:
    stop, timings = asked.answers[0].stops.found, asked.answers[0].completion.timings
    if reason == "length":
        is_full = timings.generated_tokens < call.fields["max_tokens"]
        return {
            "stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None
        }  # fmt: skip
    return {"stop_reason": STOP_REASONS[reason] if stop is None else "stop_sequence", "stop_sequence": stop}


def _usage(asked: Asked) -> dict[str, int]:
    timings = asked.answers[0].completion.timings
    return {
        "input_tokens": timings.prompt_tokens - timings.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": timings.cached_tokens,
        "output_tokens": timings.generated_tokens,
    }


async def _chunks(call: Call, asked: Asked, answers: Answers) -> AsyncGenerator[bytes, None]:
    begun = {**_head(call), "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(asked)}
    yield _event("message_start", message=begun)
    blocks, end = _Blocks(), None
    async for news in turn.told(asked, answers):
        if news is None:
            yield PING
            continue
        for part in news.parts:
            yield blocks.part(part)
        end = news.end
    assert end
    for called in end.calls:
        yield blocks.call(called)
    yield blocks.close()
    yield _event("message_delta", delta=_stop(call, asked, end.reason), usage=_usage(asked))
    yield _event("message_stop")


class _Blocks:
    """The content of a message, told block by block."""

    def __init__(self) -> None:
        self._index = -1
        self._open: bool | str | None = None
        """Of the block that is open whether it is a thought, or the id of its call; None: there is none."""

    def part(self, part: Part) -> bytes:
        name = "thinking" if part.is_thought else "text"
        return self._at(part.is_thought, _block(part.is_thought, "")) + self._delta(f"{name}_delta", name, part.text)

    def call(self, called: Called) -> bytes:
        arguments = json.dumps(called.call.arguments, ensure_ascii=False)
        return self._at(called.id, _use(called, {})) + self._delta("input_json_delta", "partial_json", arguments)

    def close(self) -> bytes:
        return b"" if self._open is None else _event("content_block_stop", index=self._index)

    def _at(self, which: bool | str, block: dict[str, Any]) -> bytes:
        """Begins another block, if it is another."""
        if which == self._open:
            return b""
        closed = self.close()
        self._open, self._index = which, self._index + 1
        ping = b"" if self._index else PING
        return closed + _event("content_block_start", index=self._index, content_block=block) + ping

    def _delta(self, type_: str, name: str, text: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": type_, name: text})


def _event(type_: str, **values: Any) -> bytes:
    return f"event: {type_}\n".encode() + event({"type": type_, **values})


PING = _event("ping")
WIRE = Wire("text/event-stream", lambda error: b"event: error\n" + event(anthropic(error)))


async def count_tokens(call: Call) -> Response:
    await call.load()
    prompt = await run_in_threadpool(_prompt, call)
    return JSONResponse({"input_tokens": len(prompt.question.ids)})


ENDPOINTS = [
    Endpoint(
        "POST", ("/v1/messages",), answering(_asked, _whole, _chunks, WIRE), Object(FIELDS, ["messages", "max_tokens"])
    ),
    Endpoint("POST", ("/v1/messages/count_tokens",), count_tokens, Object(PROMPT, ["messages"])),
]
