"""A conversation: messages in, streamed text out. Turns and cache are kept, so a new turn evaluates new tokens only."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgellm.api import Completion, Piece, Stream
from edgellm.chat_template import ChatPrompt, ChatTemplate

if TYPE_CHECKING:
    from edgellm.api import Model


class Chat:
    """Made by Model.chat. `messages` is the history, as dicts with "role" and "content"; it may be edited."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._prompt = ChatPrompt(model.tokenizer, chat_template(model))
        self._slot = model.open_slot()
        self._finalizer = weakref.finalize(self, self._slot.close)
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation that the cache holds."""
        return len(self._slot.ids)

    @property
    def is_thinking(self) -> bool:
        """Whether the template has opened a thought, so that the answer begins within it."""
        return self._prompt.text.rstrip().endswith("<think>")

    def send(self, text: str, **options: Any) -> Completion:
        """Say something; returns the answer. Takes the options of Model.generate."""
        stream = self.stream(text, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(self, text: str, **options: Any) -> Stream:
        """Say something; yields the answer piece by piece.

        Both turns are added to `messages` when the answer has begun; one that is stopped early stays as far as it came.
        Raises ContextOverflowError, with the chat as it was, when the conversation does not fit the context any more.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._prompt.encode(messages)
        stream = self._model.stream_ids(ids, slot=self._slot, **options)
        return Stream(self._remember(stream, messages), stream.completion)

    def _remember(self, stream: Stream, messages: list[dict[str, str]]) -> Iterator[Piece]:
        answer = stream.completion
        try:
            yield from stream
        finally:
            stream.close()
            if answer.timings.generated_tokens:
                self.messages = [*messages, {"role": "assistant", "content": answer.text}]
                self._prompt.answered(answer.text, answer.ids)

    def close(self) -> None:
        """Give the cache's memory back."""
        self._finalizer()


def chat_template(model: Model) -> ChatTemplate:
    """The model's template; raises ChatTemplateError if there is none."""
    eos_id = model.info.eos_ids[0] if model.info.eos_ids else None
    bos, eos = ("" if id is None else model.tokenizer.id_to_token(id) for id in (model.info.bos_id, eos_id))
    return ChatTemplate(model.info.chat_template, bos_token=bos, eos_token=eos)
