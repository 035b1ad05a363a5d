"""The next turn of a chat, whatever API asks for it: as it comes, in thoughts, text and calls."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from edgellm.answer import Answer, Completion, Piece
from edgellm.chat import Question, opening, question
from edgellm.chat_template import ChatPrompt, Tools
from edgellm.generate import check_room
from edgellm.server import openai
from edgellm.server.service import Answers, Call
from edgellm.thoughts import CLOSE, OPEN, ThoughtReader, is_thought_open
from edgellm.tools import CallReader, ToolCall


class Prompt(NamedTuple):
    question: Question
    is_thinking: bool | None
    """Whether the answer begins within a thought; None: it is plain text, in which nobody looks for thoughts."""
    opening: Callable[[str, list[int]], list[int]] | None = None
    """What the next prompt begins with if the chat goes on after an answer, of this text and these ids."""


class Asked(NamedTuple):
    prompt: Prompt
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


def prompt(
    call: Call,
    messages: list[dict[str, Any]],
    *,
    begun: dict[str, Any] | None = None,
    tools: Tools = (),
    tool_choice: str = "auto",
    thinks: bool | None = None,
) -> Prompt:
    """`tool_choice` is as Chat.stream has it; `thinks` says whether the model is to think first, None leaves that to
    its template; the answer goes on from the message `begun` if there is one."""
    model, template = call.served.model, call.served.template
    chosen = template if thinks is None else template.thinking(thinks)
    made = ChatPrompt(model.tokenizer, chosen, model.context_length)
    asked = question(model, made, messages, tools, tool_choice)
    ask = partial(question, model, made, tools=() if tool_choice == "none" else tools)

    def next_opening(text: str, ids: list[int]) -> list[int]:
        made.answered(text, ids)
        return opening(made, ask, [*messages, {"role": "assistant", "content": text}])

    is_thinking = is_thought_open(made.text)
    if begun and (text := written(begun, is_thinking)):
        asked = replace(asked, ids=made.encode_masked(made.text + made.mask(text)))
        return Prompt(asked, not begun["content"])
    return Prompt(asked, is_thinking, next_opening)


def written(begun: dict[str, Any], is_thinking: bool) -> str:
    """The beginning of an answer as the model wrote it; `is_thinking`: the template has opened a thought."""
    thought, text = begun.get("reasoning_content", ""), begun["content"]
    if not thought:
        return f"{CLOSE}{text}" if is_thinking and text else str(text)
    return f"{'' if is_thinking else OPEN}{thought}{CLOSE + text if text else ''}"


def ask(call: Call, prompt: Prompt, options: dict[str, Any], *, n: int = 1, most: int | None = None) -> Asked:
    """`options` are those of Model.stream, for each of n answers, which end where they come to `most` tokens with
    their prompt; None: those that might not fit the context are refused."""
    ids, model = prompt.question.ids, call.served.model
    if most is not None:
        most = min(most, model.context_length)
        check_room(len(ids), 1, most)
        left = most - len(ids)
        options = {**options, "max_tokens": min(options.get("max_tokens", left), left)}
    if prompt.question.grammar:
        options = {**options, "grammar": prompt.question.grammar}
    return Asked(prompt, [model.begin_ids(ids, **each) for each in openai.each_seed(options, n)])


class Reader:
    """One answer, as it comes."""

    def __init__(self, asked: Asked) -> None:
        self._asked, is_thinking = asked.prompt.question, asked.prompt.is_thinking
        self._thoughts = None if is_thinking is None else ThoughtReader(is_thinking)
        self._calls = CallReader(self._asked.style) if self._asked.style else None
        self.said = ""
        """The text so far, without thoughts and calls."""

    def push(self, piece: Piece) -> list[Part]:
        text = self._asked.text(piece)
        return self._parts([(False, text)] if self._thoughts is None else self._thoughts.push(text))

    def finish(self, completion: Completion) -> End:
        parts, reason = self._parts(self._thoughts.finish() if self._thoughts else ()), completion.finish_reason
        if self._calls is None:
            return End(parts, [], reason)
        rest, calls = self._calls.finish()
        parts += [Part(False, rest)] if rest else []
        self.said += rest
        called = [Called(_id(), each) for each in calls]
        return End(parts, called, "tool_calls" if calls and reason == "stop" else reason)

    def _parts(self, given: Iterable[tuple[bool, str]]) -> list[Part]:
        parts = [
            Part(is_thought, text if is_thought or self._calls is None else self._calls.push(text))
            for is_thought, text in given
        ]
        self.said += "".join(part.text for part in parts if not part.is_thought)
        return [part for part in parts if part.text]


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
            if end.reason in ("stop", "length") and len(readers) == 1 and (opening := asked.prompt.opening):
                answers.when_idle(partial(opening, readers[which].said, new.ids))
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
