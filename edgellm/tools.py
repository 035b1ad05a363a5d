"""Tool calls: the styles in which models write them, read while an answer is made. Knows texts, and no model."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.chat_template import Tools
from edgellm.errors import ArgumentError
from edgellm.structured.json_schema import prepared
from edgellm.text_stream import StopStrings


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How a family of models writes calls. `begin` and `end` are what a forced call is written between."""

    begin: str
    end: str
    arguments: str
    """The name that arguments go by in JSON."""
    calls: Callable[[str], list[ToolCall]]
    """The text from `begin` on -> its calls; raises ValueError if it is something else."""
    openings: Sequence[str]
    """Texts that a call begins with, `begin` or others."""
    signs: Sequence[str] = ()
    """What of it may be a special token."""
    is_list: bool = False
    may_begin_bare: bool = False
    """Whether an answer that begins with a brace is a call."""


def _calls_of_json(value: Any) -> list[ToolCall]:
    """{"name": ..., "arguments" or "parameters": {...}}, or a list of these."""
    if isinstance(value, list):
        return [call for item in value for call in _calls_of_json(item)]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    return [ToolCall(value["name"], arguments)]


def _jsons(text: str) -> list[ToolCall]:
    """JSON values one after another, with ; or white space between."""
    calls, decoder, at = list[ToolCall](), json.JSONDecoder(), 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        calls += _calls_of_json(value)
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n;"))
    return calls


def _between(begin: str, end: str, read: Callable[[str], list[ToolCall]]) -> Callable[[str], list[ToolCall]]:
    """Calls in blocks, the last of which need not be closed."""
    block = re.compile(rf"\s*{begin}(.*?)(?:{end}|$)\s*", re.DOTALL)

    def calls(text: str) -> list[ToolCall]:
        found, at = list[ToolCall](), 0
        while at < len(text):
            match = block.match(text, at)
            if not match:
                raise ValueError("text after a call")
            found += read(match[1].strip())
            at = match.end()
        return found

    return calls


def _python_calls(text: str) -> list[ToolCall]:
    """f(city="Paris"), one a line or in a list, of literals; print(...) around one is passed over."""
    body = ast.parse(text).body
    nodes = [statement.value for statement in body if isinstance(statement, ast.Expr)]
    if len(nodes) < len(body):
        raise ValueError("no calls")
    nodes = [item for node in nodes for item in (node.elts if isinstance(node, ast.List) else [node])]
    return [_python_call(node) for node in nodes]


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("no call")
    if node.func.id == "print" and len(node.args) == 1:
        return _python_call(node.args[0])
    if node.args or not all(keyword.arg for keyword in node.keywords):
        raise ValueError("arguments without names")
    return ToolCall(node.func.id, {str(item.arg): ast.literal_eval(item.value) for item in node.keywords})


def _fenced(text: str) -> list[ToolCall]:
    read = _python_calls if text.lstrip().startswith("```tool_code") else _jsons
    return _between("```(?:tool_code|json)", "```", read)(text)


STYLES = {
    "hermes": Style(
        *("<tool_call>\n", "\n</tool_call>", "arguments"),
        calls=_between("<tool_call>", "</tool_call>", _jsons),
        openings=("<tool_call>",),
        signs=("<tool_call>", "</tool_call>"),
    ),
    "mistral": Style(
        *("[TOOL_CALLS]", "", "arguments"),
        calls=_between(r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])", _jsons),
        openings=("[TOOL_CALLS]",),
        signs=("[TOOL_CALLS]",),
        is_list=True,
    ),
    "llama3": Style(
        *("", "", "parameters"),
        calls=_between(r"(?:<\|python_tag\|>)?", "$", _jsons),
        openings=("<|python_tag|>",),
        signs=("<|python_tag|>",),
        may_begin_bare=True,
    ),
    "gemma": Style(*("```json\n", "\n```", "parameters"), calls=_fenced, openings=("```tool_code", "```json")),
}
"""SmolLM and Qwen write as Hermes does."""

_SIGNS = {"[TOOL_CALLS]": "mistral", "<|python_tag|>": "llama3", "tool_code": "gemma", "<tool_call>": "hermes"}

INSTRUCTIONS = """You can call functions. These are known, as JSON schemas:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON, between tags, and nothing else:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def style_of(template: str) -> Style:
    """The style of a chat template; Hermes' for one that says nothing of it."""
    return STYLES[next((style for sign, style in _SIGNS.items() if sign in template), "hermes")]


def instructions(tools: Tools) -> str:
    """What to tell a model whose template has no place for tools."""
    return INSTRUCTIONS.format(tools="\n".join(json.dumps(tool) for tool in tools))


def checked_tools(tools: Tools) -> dict[str, Any]:
    """Name -> schema of its arguments; raises ArgumentError if one is not as OpenAI's are."""
    schemas: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name or name in schemas:
            raise ArgumentError(
                f"{str(tool)[:80]} is no tool, or has the name of another; expected "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
        schemas[name] = function.get("parameters") or {"type": "object", "properties": {}}
    return schemas


def chosen_schema(schemas: dict[str, Any], choice: str, style: Style) -> dict[str, Any]:
    """The schema of a forced call, of any tool for "required", or of the one of that name."""
    if choice != "required" and choice not in schemas:
        raise ArgumentError(
            f"tool_choice is {choice!r}; expected auto, none, required, or one of {', '.join(schemas) or 'no tools'}"
        )
    names = list(schemas) if choice == "required" else [choice]
    calls = [
        {
            "type": "object",
            # An identifier of its own, so that its references stay within it.
            "properties": {
                "name": {"const": name},
                style.arguments: {"$id": f"urn:tool:{n}", **prepared(schemas[name])},
            },
            "required": ["name", style.arguments],
            "additionalProperties": False,
        }
        for n, name in enumerate(names)
    ]
    call = {"anyOf": calls}
    return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if style.is_list else call


class CallReader:
    """Splits an answer, as it comes, into text to show and calls."""

    def __init__(self, style: Style) -> None:
        self._style, self._openings = style, StopStrings(style.openings)
        self._held, self._in_call, self._undecided = "", False, style.may_begin_bare

    def push(self, text: str) -> str:
        """The text that is certainly no call."""
        self._held += text
        if self._undecided and self._held.strip():
            self._undecided, text = False, self._held
            self._in_call = text.lstrip().startswith("{")
        if self._in_call or self._undecided:
            return ""
        shown, self._in_call = self._openings.push(text)
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text that is left to show, and the calls. What only looked like calls is text."""
        if not self._in_call:
            return self._held, []
        try:
            return "", self._style.calls(self._held)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return self._held, []
