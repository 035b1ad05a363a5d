"""A conversation: messages in, streamed text out. Turns and cache are kept, so a new turn evaluates new tokens only."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgellm.adapter import Adapter
from edgellm.answer import Answer, Completion, Piece, Stream, Turn
from edgellm.chat_template import ChatPrompt, ChatTemplate, Tools
from edgellm.errors import ArgumentError
from edgellm.generate import common
from edgellm.overflow import SINKS, check_policy, fits, most_left
from edgellm.thoughts import is_thought_open

if TYPE_CHECKING:
    from edgellm.api import Model
    from edgellm.async_stream import AsyncStream
    from edgellm.structured.constraint import Grammar
    from edgellm.tools import CallReader, Style


class Chat:
    """A conversation; made by Model.chat. `messages` is the history, as dicts with "role" and "content", and may be
    edited. `adapter` may be changed too: the history is then evaluated again with the next answer."""

    def __init__(self, model: Model, system: str | None = None, adapter: Adapter | None = None) -> None:
        self._model, self.adapter = model, adapter
        self._prompt = ChatPrompt(model.tokenizer, chat_template(model))
        self._left_out: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    @property
    def n_tokens(self) -> int:
        """How many tokens of the conversation are in the cache; 0 while an answer is being generated."""
        return len(self._model.prefix_cache.tokens_of(self))

    @property
    def is_thinking(self) -> bool:
        """Whether the template ends with the start of a thought, so that the answer begins inside it."""
        return is_thought_open(self._prompt.text)

    def send(self, text: str, **options: Any) -> Completion:
        """Send a message, and return the complete answer. Takes the same arguments as `stream`."""
        stream = self.stream(text, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self, text: str, *, role: str = "user", tools: Tools = (), tool_choice: str = "auto", **options: Any
    ) -> Stream:
        """Send a message; yields the answer piece by piece. `options` are the arguments of Model.stream.

        The message and the answer are added to `messages` once the answer has begun; an answer that is stopped early
        is kept as far as it came.

        When the conversation no longer fits the context, ContextOverflowError is raised and the chat stays as it was.
        With `overflow="shift"` the model does not see the oldest turns instead; they stay in `messages`, and the
        completion's `dropped_messages` lists them. The system message always stays, and the last message must fit.
        With "window" the last message may be cut too, after its beginning, and the answer may be longer than the
        context: see Model.stream.

        `tools` are functions that the model may call, in the format of OpenAI's API. Its calls are the completion's
        `tool_calls`; send their results with `role="tool"`. `tool_choice` is "auto", "none", "required" or the name of
        a function: with the last two the answer is a call, whose arguments follow the function's schema.
        """
        messages, asked = self._ask(text, role, tools, tool_choice, options)
        stream = self._model.stream_ids(asked.ids, keeper=self, **options)
        return Stream(_shown(stream, self._turn(messages, asked, stream.completion)), stream.completion)

    async def asend(self, text: str, **options: Any) -> Completion:
        """As `send`, but awaited. Cancelling the task stops the answer at the next token."""
        async with self.astream(text, **options) as stream:
            async for _ in stream:
                pass
        return stream.completion

    def astream(
        self, text: str, *, role: str = "user", tools: Tools = (), tool_choice: str = "auto", **options: Any
    ) -> AsyncStream:
        """As `stream`, for `async for`: see Model.astream."""

        def begin() -> tuple[Answer, Turn]:
            messages, asked = self._ask(text, role, tools, tool_choice, options)
            answer = self._model.begin_ids(asked.ids, **options)
            return answer, self._turn(messages, asked, answer.completion)

        from edgellm.async_stream import AsyncStream

        return AsyncStream(begin, self._model.submit)

    def _ask(
        self, text: str, role: str, tools: Tools, tool_choice: str, options: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], Question]:
        """The messages with the new one, and the question that they make: of all of them, or unless overflow is
        "error" of those that fit. Adds to `options` the grammar of a required call, and the overflow policy."""
        if role not in ("user", "tool"):
            raise ArgumentError(f"the role is {role!r}; expected user or tool")
        messages = [*self.messages, {"role": role, "content": text}]
        ask = partial(question, self._model, self._prompt, tools=tools, tool_choice=tool_choice)
        options.setdefault("adapter", self.adapter)
        check_policy(overflow := options.pop("overflow", "error"))
        if overflow == "window":
            options |= {"overflow": overflow, "n_first": self._n_first(ask)}
        max_tokens = None if overflow == "window" else options.get("max_tokens")
        asked = ask(messages) if overflow == "error" else self._fitted(messages, ask, max_tokens)
        if asked.grammar:
            if options.get("grammar") is not None:
                raise ArgumentError("grammar and tool_choice are both given; expected one of them")
            options["grammar"] = asked.grammar
        return messages, asked

    def _fitted(
        self, messages: list[dict[str, Any]], ask: Callable[[list[dict[str, Any]]], Question], max_tokens: int | None
    ) -> Question:
        """The question, without the oldest turns if they do not fit. Turns that were left out before stay out."""
        system, turns = _parted(messages)

        def seen(begin: int) -> Question:
            return ask([*system, *turns[begin:]])

        begin = self._n_left_out(turns)
        asked, context_length = seen(begin), self._model.context_length
        if not fits(len(asked.ids), max_tokens, context_length):
            begins = [i for i, message in enumerate(turns) if message["role"] == "user" and i > begin] or [begin]
            most = most_left(max_tokens, context_length)
            enough = bisect_left(begins, True, hi=len(begins) - 1, key=lambda each: len(seen(each).ids) <= most)
            begin = begins[enough]
            asked = seen(begin)
        return replace(asked, left_out=turns[:begin])

    def _n_left_out(self, turns: list[dict[str, Any]]) -> int:
        return len(self._left_out) if turns[: len(self._left_out)] == self._left_out else 0

    def _n_first(self, ask: Callable[[list[dict[str, Any]]], Question]) -> int:
        """How many tokens the system message takes, with what the template writes before the next message."""
        system, _ = _parted(self.messages)
        return max(SINKS, len(opening(self._prompt, ask, system)))

    def _turn(self, messages: list[dict[str, Any]], asked: Question, answer: Completion) -> Turn:
        self._left_out = answer.dropped_messages = asked.left_out
        if asked.style is None:
            return _Turn(self, messages, answer)
        from edgellm.tools import CallReader

        return _TurnWithCalls(self, messages, answer, asked, CallReader(asked.style))

    def prepare(self, *, tools: Tools = (), stopped: Callable[[], bool] = lambda: False) -> int:
        """Evaluate what the next prompt begins with, whatever its message says: the messages so far, and what the
        template writes around them. The next answer then begins sooner: call it while a person reads or types, from
        another thread if need be. Returns how many tokens were evaluated.

        `tools` are those that `stream` will be given. What was evaluated before `stopped` returns true is kept; it is
        asked every few tokens. Does nothing when the messages do not fit the context.
        """
        system, turns = _parted(self.messages)
        seen = [*system, *turns[self._n_left_out(turns) :]]
        ids = opening(self._prompt, partial(question, self._model, self._prompt, tools=tools), seen)
        if not ids or not fits(len(ids), None, self._model.context_length):
            return 0
        return self._model.prepare_ids(ids, stopped, keeper=self, adapter=self.adapter)

    def save_cache(self, path: str | os.PathLike[str]) -> int:
        """Write the conversation's KV cache to a file; returns its number of tokens. See Model.save_cache."""
        extra = {**self._prompt.state, "n_left_out": len(self._left_out)}
        return self._model.save_cache(path, keeper=self, extra=extra)

    def load_cache(self, path: str | os.PathLike[str]) -> int:
        """Read a file of `save_cache`; returns its number of tokens. Set `messages` first: the cache is used as far as
        they agree with it. Raises ArgumentError if the file is damaged, or was written with another model, adapter,
        backend or context length."""
        saved = self._model.load_cache(path, keeper=self, adapter=self.adapter)
        if saved.extra:  # else it was no chat that saved it
            self._prompt.restore(saved.extra)
            _, turns = _parted(self.messages)
            n_left_out = saved.extra.get("n_left_out")
            self._left_out = turns[:n_left_out] if isinstance(n_left_out, int) else []
        return len(saved.ids)

    def close(self) -> None:
        """Let other conversations use the cache's memory."""
        self._model.prefix_cache.release(self)


def _shown(stream: Stream, turn: Turn) -> Iterator[Piece]:
    try:
        for piece in stream:
            if shown := turn.show(piece):
                yield shown
        if last := turn.finish():
            yield last
    finally:
        stream.close()
        turn.remember()


class _Turn(Turn):
    """An answer that is added to a chat's messages."""

    def __init__(self, chat: Chat, messages: list[dict[str, Any]], answer: Completion) -> None:
        self._chat, self._messages, self._answer = chat, messages, answer

    def remember(self) -> None:
        if self._answer.timings.generated_tokens:
            message = self._message()
            self._chat.messages = [*self._messages, message]
            self._chat._prompt.answered(message["content"], self._answer.ids)

    def _message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self._answer.text}


class _TurnWithCalls(_Turn):
    """An answer that may have tool calls: their text is left out of the pieces, and they come with the last one."""

    def __init__(
        self, chat: Chat, messages: list[dict[str, Any]], answer: Completion, asked: Question, reader: CallReader
    ) -> None:
        super().__init__(chat, messages, answer)
        self._asked, self._reader = asked, reader
        self._visible = self._said = ""

    def show(self, piece: Piece) -> Piece | None:
        text = self._asked.text(piece)
        self._said += text
        visible = self._reader.push(text)
        self._visible += visible
        return None if piece.id is None else Piece(visible, piece.id)

    def finish(self) -> Piece:
        rest, calls = self._reader.finish()
        answer = self._answer
        answer.text, answer.tool_calls = self._visible + rest, calls
        if calls and answer.finish_reason == "stop":
            answer.finish_reason = "tool_calls"
        return Piece(rest, None, calls)

    def _message(self) -> dict[str, Any]:
        return _answer_message(self._answer, self._said, self._asked.is_told)


@dataclass(frozen=True)
class Question:
    """A chat as the model sees it, and how to read the answer."""

    ids: list[int]
    style: Style | None = None
    """The format of the answer's calls; None if there are no tools."""
    is_told: bool = False
    """Whether the template has a place for tools."""
    signs: Mapping[int, str] = field(default_factory=dict)
    """Those marks of the style that are special tokens, and so give no text of their own."""
    grammar: Grammar | None = None
    """The form of the answer, if it must be a call."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """The oldest messages, for which there is no room."""

    def text(self, piece: Piece) -> str:
        """What the model wrote, including the marks of calls."""
        return piece.text if piece.id is None else self.signs.get(piece.id, "") + piece.text


def question(
    model: Model, prompt: ChatPrompt, messages: list[dict[str, Any]], tools: Tools = (), tool_choice: str = "auto"
) -> Question:
    """The ids of a chat, and how its answer is read. `tools` and `tool_choice` are those of `Chat.stream`."""
    is_free = not tools or tool_choice == "none"
    tells_calls = not prompt.template.shows_calls and any("tool_calls" in message for message in messages)
    if is_free and not tells_calls:
        return Question(prompt.encode(messages))
    # Imported only when needed: it takes as long as a token.
    from edgellm.tools import checked_tools, chosen_schema, style_of

    style = style_of(model.info.chat_template or "")
    if tells_calls:
        messages = [_said(message, style) for message in messages]
    if is_free:
        return Question(prompt.encode(messages))
    schemas, grammar = checked_tools(tools), None
    if tool_choice != "auto":
        from edgellm.structured.constraint import call_grammar

        begin, end = (_as_lark(model, text) for text in (style.begin, style.end))
        grammar = call_grammar(chosen_schema(schemas, tool_choice, style), begin, end, "tool_choice")
    is_told = prompt.render_masked(messages) != prompt.render_masked(messages, tools=tools)
    ids = prompt.encode(messages if is_told else _instructed(messages, tools), tools=tools if is_told else ())
    signs = {id: text for text, id in model.tokenizer.special_tokens.items() if text in style.signs}
    return Question(ids, style, is_told, signs, grammar)


def opening(
    prompt: ChatPrompt, ask: Callable[[list[dict[str, Any]]], Question], messages: list[dict[str, Any]]
) -> list[int]:
    """The ids that the prompt of these messages and a user's next one begins with, whatever that says. `ask` makes a
    question with `prompt`."""
    found = []
    for text in ("a", "b"):
        with prompt.unchanged():
            found.append(ask([*messages, {"role": "user", "content": text}]).ids)
    return found[0][: common(*found)]


def _as_lark(model: Model, text: str) -> str:
    parts = model.tokenizer.split_special(text)
    return " ".join(f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in parts)


def _said(message: dict[str, Any], style: Style) -> dict[str, Any]:
    """A message whose calls are text, for a template that leaves them out."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [{"name": each["name"], style.arguments: each["arguments"]} for each in functions]
    said = "\n".join(f"{style.begin}{json.dumps(call)}{style.end}" for call in calls)
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": (message.get("content") or "") + said}


def _parted(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The system's message, if there is one, and the others."""
    n_system = int(messages[:1] != [] and messages[0]["role"] == "system")
    return messages[:n_system], messages[n_system:]


def _instructed(messages: list[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """The messages with the tools in the system's."""
    from edgellm.tools import instructions

    system, others = _parted(messages)
    told = "".join(message["content"] + "\n\n" for message in system)
    return [{"role": "system", "content": told + instructions(tools)}, *others]


def _answer_message(answer: Completion, said: str, is_told: bool) -> dict[str, Any]:
    """An answer as its template wants to see it again: with its calls, or as it was said."""
    if not answer.tool_calls or not is_told:
        return {"role": "assistant", "content": said}
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in answer.tool_calls
    ]
    return {"role": "assistant", "content": answer.text, "tool_calls": calls}


def chat_template(model: Model) -> ChatTemplate:
    """The model's template; raises ChatTemplateError if there is none."""
    eos_id = model.info.eos_ids[0] if model.info.eos_ids else None
    bos, eos = ("" if id is None else model.tokenizer.id_to_token(id) for id in (model.info.bos_id, eos_id))
    return ChatTemplate(model.info.chat_template, bos_token=bos, eos_token=eos)
