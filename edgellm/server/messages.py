"""Messages and tools of a request, as OpenAI's API has them -> as chat templates want to see them."""

from __future__ import annotations

import json
from typing import Any

from edgellm.server.errors import RequestError
from edgellm.server.schema import Anything, Either, Flag, ListOf, MapOf, Object, Text

PART = Object({"type": Text(("text",)), "text": Text()}, ["type", "text"])
CALL = Object(
    {
        "id": Text(),
        "type": Text(("function",)),
        "index": Anything(),
        "function": Object({"name": Text(), "arguments": Text()}, ["name", "arguments"]),
    },
    ["function"],
)
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE = Object(
    {
        "role": Text(ROLES),
        "content": Either((Text(), ListOf(PART))),
        "name": Text(),
        "reasoning_content": Text(),
        "tool_calls": ListOf(CALL),
        "tool_call_id": Text(),
        "annotations": ListOf(Anything()),
    },
    ["role"],
)
MESSAGES = ListOf(MESSAGE, least=1)
MOST_TOOLS = 1000
TOOLS = ListOf(
    Object(
        {
            "type": Text(("function",)),
            "function": Object(
                {"name": Text(), "description": Text(), "parameters": MapOf(Anything()), "strict": Flag()}, ["name"]
            ),
        },
        ["function"],
    ),
    most=MOST_TOOLS,
)


def messages_of(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages that were read as MESSAGES; raises RequestError for one that says nothing."""
    return [_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def _message(given: dict[str, Any], at: str) -> dict[str, Any]:
    calls = given.get("tool_calls", [])
    if "content" not in given and not (given["role"] == "assistant" and calls):
        raise RequestError(f"{at}.content is missing; expected a text, or a list of parts", param=f"{at}.content")
    content = given.get("content", "")
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    # Templates know no developer, who is the system of newer models.
    role = "system" if given["role"] == "developer" else given["role"]
    message = {"role": role, "content": text}
    message |= {key: given[key] for key in ("name", "reasoning_content", "tool_call_id") if key in given}
    if calls:
        message["tool_calls"] = [_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message


def _call(given: dict[str, Any], at: str) -> dict[str, Any]:
    function = given["function"]
    arguments = arguments_of(function["arguments"], f"{at}.function.arguments")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**call, "id": given["id"]} if "id" in given else call


def arguments_of(text: str, at: str) -> dict[str, Any]:
    """Those of a call; raises RequestError."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{at} are {text[:60]!r}; expected the text of a JSON object", param=at)
    return arguments
