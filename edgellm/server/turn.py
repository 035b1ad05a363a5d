"""The next turn of a chat, whatever API asks for it: as it comes, in thoughts, text and calls."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from edgellm.answer import Answer, Completion, Piece
from edgellm.chat import Question, question
from edgellm.chat_template import Tools
from edgellm.server import openai
from edgellm.server.service import Answers, Call
from edgellm.thoughts import CLOSE, OPEN, ThoughtReader, is_thought_open
from edgellm.tools import CallReader, ToolCall


class Asked(NamedTuple):
    question: Question
    is_thinking: bool
    """Whether the answer begins within a thought."""
    answers: list[Answer]


class Part(NamedTuple):
    is_thought: bool
    text: str


class Called(NamedTuple):
    """A call by an id of its own."""

    id: str
    call: ToolCall


class End(NamedTuple):
    parts: list[Part]
    """What is left to show."""
    calls: list[Called]
    reason: str
    """As a Completion has it."""


class Said(NamedTuple):
    """All of a turn."""

    thoughts: str
    text: str
    calls: list[Called]
    reason: str


class News(NamedTuple):
    """What there is to tell of one of the answers."""

    which: int
    parts: list[Part]
    n_tokens: int
    """That the parts came with."""
    end: End | None = None


def ask(
    call: Call,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    *,
    begun: dict[str, Any] | None = None,
    tools: Tools = (),
    tool_choice: str = "auto",
    n: int = 1,
) -> Asked:
    """`options` are those of Model.stream, for each of n answers, which go on from the message `begun` if there is one;
    `tool_choice` is as Chat.stream has it."""
    model, prompt = call.served.model, call.served.prompt()
    asked = question(model, prompt, messages, tools, tool_choice)
    is_thinking = is_thought_open(prompt.text)
    if begun:
        text = written(begun, is_thinking)
        asked = replace(asked, ids=prompt.encode_masked(prompt.text + prompt.mask(text)))
        is_thinking = bool(begun.get("reasoning_content")) and not begun["content"]
    if asked.grammar:
        options = {**options, "grammar": asked.grammar}
    each = openai.each_seed(options, n)
    return Asked(asked, is_thinking, [model.begin_ids(asked.ids, **options) for options in each])


def written(begun: dict[str, Any], is_thinking: bool) -> str:
    """The beginning of an answer as the model wrote it; `is_thinking`: the template has opened a thought."""
    thought, text = begun.get("reasoning_content", ""), begun["content"]
    if not thought:
        return f"{CLOSE}{text}" if is_thinking and text else str(text)
    return f"{'' if is_thinking else OPEN}{thought}{CLOSE + text if text else ''}"


class Reader:
    """One answer, as it comes."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._thoughts = asked.question, ThoughtReader(asked.is_thinking)
        self._calls = CallReader(self._asked.style) if self._asked.style else None

    def push(self, piece: Piece) -> list[Part]:
        return self._parts(self._thoughts.push(self._asked.text(piece)))

    def finish(self, completion: Completion) -> End:
        parts, reason = self._parts(self._thoughts.finish()), completion.finish_reason
        if self._calls is None:
            return End(parts, [], reason)
        rest, calls = self._calls.finish()
        parts += [Part(False, rest)] if rest else []
        called = [Called(_id(), each) for each in calls]
        return End(parts, called, "tool_calls" if calls and reason == "stop" else reason)

    def _parts(self, given: Iterable[tuple[bool, str]]) -> list[Part]:
        shown = (
            Part(is_thought, text if is_thought or self._calls is None else self._calls.push(text))
            for is_thought, text in given
        )
        return [part for part in shown if part.text]


def _id() -> str:
    # Nine letters or digits: the templates of Mistral take no other.
    return f"call{secrets.token_hex(3)[:5]}"


async def told(asked: Asked, answers: Answers) -> AsyncIterator[News | None]:
    """The answers as they come, and None now and then as a sign of life; raises what Answers.events does."""
    readers = [Reader(asked) for _ in asked.answers]
    async for event in answers.events():
        if event is None:
            yield None
            continue
        which, new = event
        if isinstance(new, Piece):
            yield News(which, readers[which].push(new), int(new.id is not None))
        else:
            end = readers[which].finish(new)
            yield News(which, end.parts, 0, end)


async def said(asked: Asked, answers: Answers) -> list[Said]:
    """Each answer when all are complete."""
    parts: list[list[Part]] = [[] for _ in asked.answers]
    ends: dict[int, End] = {}
    async for news in told(asked, answers):
        if news:
            parts[news.which] += news.parts
            if news.end:
                ends[news.which] = news.end
    return [whole(each, ends[i]) for i, each in enumerate(parts)]


def whole(parts: Iterable[Part], end: End) -> Said:
    """`parts` with those of the end."""
    thoughts, text = ("".join(part.text for part in parts if part.is_thought is kind) for kind in (True, False))
    return Said(thoughts, text, end.calls, end.reason)
