"""Chats to text and to ids. Knows templates and special tokens; knows no model."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from edgellm.errors import ArgumentError, ChatTemplateError, UnsupportedError
from edgellm.text_stream import TextStream
from edgellm.thoughts import OPEN

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
"""As OpenAI has them: {"type": "function", "function": {"name": ..., "description": ..., "parameters": schema}}."""

SWITCHES = {"enable_thinking", "thinking"}
"""What templates call whether the model is to think before it answers."""
_MARK = "\U000f0000"


class ChatTemplate:
    """A model's own Jinja template. Threads may share one."""

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "") -> None:
        """Raises ChatTemplateError if there is no template, or its syntax is wrong."""
        from jinja2 import TemplateSyntaxError

        from edgellm.template_sandbox import Sandbox

        if not source:
            raise ChatTemplateError("the model has no chat template; expected one: use generate, or another model")
        self.source, self._sandbox, self._lock = source, Sandbox(), threading.Lock()
        self._names: dict[str, Any] = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "tools": None,
            "documents": None,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        try:
            self._template = self._sandbox.compiled(source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is wrong in line {error.lineno}: {error.message}; "
                "expected Jinja: use another model, or generate"
            ) from error
        except Exception as error:
            raise _failure(error) from error

    @property
    def shows_calls(self) -> bool:
        """Whether it writes the calls of messages; others leave them out."""
        return "tool_calls" in self.source

    @cached_property
    def _switches(self) -> set[str]:
        from jinja2.meta import find_undeclared_variables

        return SWITCHES & find_undeclared_variables(self._sandbox.parse(self.source))

    @property
    def may_think(self) -> bool:
        """Whether the model may think before it answers."""
        return bool(self._switches) or OPEN in self.source

    def thinking(self, thinks: bool) -> ChatTemplate:
        """One that lets the model think before it answers, or not; raises UnsupportedError if it cannot be told to."""
        if not self._switches and thinks != self.may_think:
            found = "never thinks" if thinks else "always thinks"
            raise UnsupportedError(f"the model {found} before it answers; expected no wish that it does otherwise")
        made = copy(self)
        made._names = {**self._names, **dict.fromkeys(self._switches, thinks)}
        return made

    def render(self, messages: Messages, add_generation_prompt: bool = True, tools: Tools = ()) -> str:
        """The chat as the model was trained to see it; raises ChatTemplateError for whatever goes wrong."""
        from edgellm.template_sandbox import Meter

        try:
            with self._lock:
                self._sandbox.meter = Meter()
                names = {**self._names, "tools": list(tools) or None}
                return self._template.render(names, messages=messages, add_generation_prompt=add_generation_prompt)
        except ChatTemplateError:
            raise
        # There is no end to what a stranger's code may raise.
        except Exception as error:
            raise _failure(error) from error


class ChatPrompt:
    """A conversation as ids. Keeps the ids of what is in it already, so the model's own words are never encoded anew.

    Special tokens are read in what the template writes, and never in what the messages say. For that, one in a message
    is masked before rendering: a mark, and a character that numbers it, both of a plane of Unicode that has no
    characters.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, most_tokens: int | None = None) -> None:
        """With `most_tokens`, text that has more for its mere length raises ContextOverflowError and is not encoded."""
        self._tokenizer, self.template, self._most_tokens = tokenizer, template, most_tokens
        specials = [_MARK, *tokenizer.special_tokens]
        self._masks = {text: _MARK + chr(ord(_MARK) + n) for n, text in enumerate(specials)}
        self._unmasks = {mask: text for text, mask in self._masks.items()}
        self._text, self._ids = "", list[int]()

    @property
    def text(self) -> str:
        """What the last call of encode rendered, and the answer to it if there was one."""
        return self._text

    def encode(self, messages: Messages, add_generation_prompt: bool = True, tools: Tools = ()) -> list[int]:
        """The ids of a whole chat, those of the last call and its answer kept where the chat goes on from there."""
        text = self.render_masked(messages, add_generation_prompt, tools)
        rest = text[len(self._text) :]
        if self._ids and text.startswith(self._text) and self._parts_at(rest):
            ids = self._ids + self.encode_masked(rest, first=False)
        else:
            ids = self.encode_masked(text)
        self._text, self._ids = text, ids
        return list(ids)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is encoded meanwhile, the next call goes on from where it would have."""
        text, ids = self._text, self._ids
        try:
            yield
        finally:
            self._text, self._ids = text, ids

    def answered(self, text: str, ids: Sequence[int]) -> None:
        """What the model said after the last encode, so that the next call goes on from there."""
        stream = TextStream(self._tokenizer, self._ids)
        # A stop string or an edit shortens the text: then the ids say more than the chat.
        if "".join(map(stream.push, ids)) + stream.flush() == text:
            self._text += self.mask(text)
            self._ids = [*self._ids, *ids]

    @property
    def state(self) -> dict[str, Any]:
        """What the next call of encode goes on from, as JSON can hold it: for `restore`."""
        return {"text": self._text, "ids": self._ids}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where another prompt was; raises ArgumentError for what is no state."""
        text, ids, vocab_size = state.get("text"), state.get("ids"), self._tokenizer.vocab_size
        if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < vocab_size for id in ids):
            raise ArgumentError(f"what was kept of the conversation has the ids {str(ids)[:80]}; expected token ids")
        if not isinstance(text, str):
            raise ArgumentError(f"what was kept of the conversation has the text {str(text)[:80]}; expected a string")
        self._text, self._ids = text, ids

    def render_masked(self, messages: Messages, add_generation_prompt: bool = True, tools: Tools = ()) -> str:
        masked = [self._mask_all(message) for message in messages]
        return self.template.render(masked, add_generation_prompt, [self._mask_all(tool) for tool in tools])

    def encode_masked(self, text: str, first: bool = True) -> list[int]:
        """The ids of masked text; the `first` of a chat begins with BOS if the tokenizer wants it, but never with two.

        Text that is not the first must begin or follow a special token, as SentencePiece puts a space there.
        """
        if self._most_tokens is not None:
            self._tokenizer.check_size(text, self._most_tokens)
        if _MARK in text:
            ids = [id for part in self._tokenizer.split_special(text) for id in self._encode_part(part)]
        else:
            ids = self._tokenizer.encode(text, add_special=False)
        bos_id = self._tokenizer.bos_id
        if first and bos_id is not None and self._tokenizer.adds_bos and ids[:1] != [bos_id]:
            return [bos_id, *ids]
        return ids

    def mask(self, text: str) -> str:
        if _MARK in text:
            text = text.replace(_MARK, self._masks[_MARK])
        return self._tokenizer.special_pattern.sub(lambda match: self._masks[match[0]], text)

    def _mask_all(self, value: Any) -> Any:
        """Every text within a message."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, Mapping):
            return {key: self._mask_all(item) for key, item in value.items()}
        return [self._mask_all(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _unmask(self, text: str) -> str:
        return re.sub(f"{_MARK}.", lambda match: self._unmasks.get(match[0], match[0]), text, flags=re.DOTALL)

    def _encode_part(self, part: str | int) -> list[int]:
        if isinstance(part, int):
            return [part]
        return self._tokenizer.encode(self._unmask(part), add_special=False, parse_special=False)

    def _parts_at(self, rest: str) -> bool:
        """Whether `rest` can be encoded apart from what is before it: a special token stands between."""
        return (
            not rest
            or self._tokenizer.is_special(self._ids[-1])
            or self._tokenizer.special_pattern.match(rest) is not None
        )


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a chat, with BOS once if the tokenizer adds it. Special tokens in a message are plain text."""
    return ChatPrompt(tokenizer, template).encode(messages, add_generation_prompt)


def _raise_exception(message: object) -> NoReturn:
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _failure(error: Exception) -> ChatTemplateError:
    return ChatTemplateError(
        f"the chat template failed: {str(error) or type(error).__name__}; expected it to render: "
        "check the messages, or use another model"
    )
