"""A conversation: messages in, streamed text out. Turns and cache are kept, so a new turn evaluates new tokens only."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from edgellm.api import Completion, Piece, Stream
from edgellm.chat_template import ChatPrompt, ChatTemplate, Tools
from edgellm.errors import ArgumentError
from edgellm.overflow import check_policy, fits, most_left
from edgellm.structured.constraint import Grammar, call_grammar
from edgellm.tools import CallReader, Style, checked_tools, chosen_schema, instructions, style_of

if TYPE_CHECKING:
    from edgellm.api import Model


Encode = Callable[[list[dict[str, Any]]], list[int]]
"""Messages -> the ids of a chat that the model is to go on with."""


class Chat:
    """Made by Model.chat. `messages` is the history, as dicts with "role" and "content"; it may be edited."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._prompt = ChatPrompt(model.tokenizer, chat_template(model))
        self._left_out: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation that the cache holds; 0 while an answer is under way."""
        return len(self._model.prefix_cache.tokens_of(self))

    @property
    def is_thinking(self) -> bool:
        """Whether the template has opened a thought, so that the answer begins within it."""
        return self._prompt.text.rstrip().endswith("<think>")

    def send(self, text: str, **options: Any) -> Completion:
        """Say something; returns the answer. Takes the options of `stream`."""
        stream = self.stream(text, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self, text: str, *, role: str = "user", tools: Tools = (), tool_choice: str = "auto", **options: Any
    ) -> Stream:
        """Say something; yields the answer piece by piece. Takes the options of Model.generate.

        Both turns are added to `messages` when the answer has begun; one that is stopped early stays as far as it came.
        Raises ContextOverflowError, with the chat as it was, when the conversation does not fit the context any more,
        unless `overflow` is "shift": then the model does not see the oldest turns, which stay in `messages`, and of
        which the completion's `dropped_messages` tells. The system message stays, and the last one must fit.

        `tools` are functions that the model may ask for, as OpenAI's API has them: the answer's `tool_calls`, whose
        results are sent with the role "tool". `tool_choice` is "auto", "none", "required", or the name of a function:
        with the last two the answer is a call, and its arguments are what their schema allows.
        """
        if role not in ("user", "tool"):
            raise ArgumentError(f"the role is {role!r}; expected user or tool")
        messages = [*self.messages, {"role": role, "content": text}]
        if not tools or tool_choice == "none":
            stream = self._begun(messages, self._prompt.encode, **options)
            return Stream(self._remember(stream, messages), stream.completion)
        style, schemas = style_of(self._model.info.chat_template or ""), checked_tools(tools)
        if tool_choice != "auto":
            options["grammar"] = self._call_grammar(style, chosen_schema(schemas, tool_choice, style), options)
        is_told = self._prompt.render_masked(messages) != self._prompt.render_masked(messages, tools=tools)

        def encode(seen: list[dict[str, Any]]) -> list[int]:
            return self._prompt.encode(seen if is_told else _instructed(seen, tools), tools=tools if is_told else ())

        stream = self._begun(messages, encode, **options)
        return Stream(self._with_calls(stream, messages, style, is_told), stream.completion)

    def _begun(
        self, messages: list[dict[str, Any]], encode: Encode, *, overflow: str = "error", **options: Any
    ) -> Stream:
        """An answer to the messages, or with overflow="shift" to those that fit."""
        check_policy(overflow)
        shifts = overflow == "shift"
        system, turns = _parted(messages)
        begin = len(self._left_out) if shifts and turns[: len(self._left_out)] == self._left_out else 0
        ids = encode([*system, *turns[begin:]])
        max_tokens, context_length = options.get("max_tokens"), self._model.context_length
        if shifts and not fits(len(ids), max_tokens, context_length):
            begins = [i for i, message in enumerate(turns) if message["role"] == "user" and i > begin] or [begin]
            most = most_left(max_tokens, context_length)
            enough = bisect_left(
                begins, True, hi=len(begins) - 1, key=lambda begin: len(encode([*system, *turns[begin:]])) <= most
            )
            begin = begins[enough]
            ids = encode([*system, *turns[begin:]])
        stream = self._model.stream_ids(ids, keeper=self, **options)
        self._left_out = stream.completion.dropped_messages = turns[:begin]
        return stream

    def _remember(self, stream: Stream, messages: list[dict[str, Any]]) -> Iterator[Piece]:
        answer = stream.completion
        try:
            yield from stream
        finally:
            stream.close()
            if answer.timings.generated_tokens:
                self.messages = [*messages, {"role": "assistant", "content": answer.text}]
                self._prompt.answered(answer.text, answer.ids)

    def _with_calls(
        self, stream: Stream, messages: list[dict[str, Any]], style: Style, is_told: bool
    ) -> Iterator[Piece]:
        """The pieces without the text of calls, which come with the last one."""
        answer, reader = stream.completion, CallReader(style)
        # Some models have tokens of their own for the signs of a call, which give no text.
        signs = {id: text for text, id in self._model.tokenizer.special_tokens.items() if text in style.signs}
        shown = said = ""
        try:
            for piece in stream:
                text = signs.get(piece.id, "") + piece.text if piece.id is not None else piece.text
                said += text
                visible = reader.push(text)
                shown += visible
                if piece.id is not None:
                    yield Piece(visible, piece.id)
            rest, calls = reader.finish()
            answer.text, answer.tool_calls = shown + rest, calls
            if calls and answer.finish_reason == "stop":
                answer.finish_reason = "tool_calls"
            yield Piece(rest, None, calls)
        finally:
            stream.close()
            if answer.timings.generated_tokens:
                self.messages = [*messages, _answer_message(answer, said, is_told)]
                self._prompt.answered(self.messages[-1]["content"], answer.ids)

    def _call_grammar(self, style: Style, schema: dict[str, Any], options: dict[str, Any]) -> Grammar:
        if options.get("grammar") is not None:
            raise ArgumentError("grammar and tool_choice are both given; expected one of them")
        begin, end = (self._as_lark(text) for text in (style.begin, style.end))
        return call_grammar(schema, begin, end, "tool_choice")

    def _as_lark(self, text: str) -> str:
        parts = self._model.tokenizer.split_special(text)
        return " ".join(f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in parts)

    def save_cache(self, path: str | os.PathLike[str]) -> int:
        """Write what the model remembers of the conversation; returns how many tokens. See Model.save_cache."""
        extra = {**self._prompt.state, "n_left_out": len(self._left_out)}
        return self._model.save_cache(path, keeper=self, extra=extra)

    def load_cache(self, path: str | os.PathLike[str]) -> int:
        """Go on with what `save_cache` wrote, as far as `messages`, set before, begin so; returns how many tokens it
        holds. Raises ArgumentError for a file that is damaged, or was written with another model, backend or context
        length."""
        saved = self._model.load_cache(path, keeper=self)
        if saved.extra:  # else it was no chat that saved it
            self._prompt.restore(saved.extra)
            _, turns = _parted(self.messages)
            n_left_out = saved.extra.get("n_left_out")
            self._left_out = turns[:n_left_out] if isinstance(n_left_out, int) else []
        return len(saved.ids)

    def close(self) -> None:
        """Let the cache's memory go to other conversations."""
        self._model.prefix_cache.release(self)


def _parted(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The system's message, if there is one, and the others."""
    n_system = int(messages[:1] != [] and messages[0]["role"] == "system")
    return messages[:n_system], messages[n_system:]


def _instructed(messages: list[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """The messages with the tools in the system's."""
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
