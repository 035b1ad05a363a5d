"""OpenAI's completions of plain text, and how likely a model finds a text: echo with logprobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, Response

from edgellm.answer import Answer, Completion, Piece
from edgellm.api import Model
from edgellm.logprobs import Logprob
from edgellm.server import openai
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.schema import Flag, Kind, Object, Text, Whole
from edgellm.server.service import Answers, Call
from edgellm.server.streams import PING, answering
from edgellm.text_stream import TextStream

MAX_TOKENS = 16
"""OpenAI's default here."""
FIELDS: dict[str, Kind] = {
    "prompt": openai.TEXTS,
    **openai.COMMON,
    "echo": Flag(),
    "logprobs": Whole(0, openai.MOST_TOP),
    "best_of": Whole(1),
    "suffix": Text(),
    "json_schema": openai.JSON_SCHEMA,
    **openai.STRUCTURE,
}


class Asked(NamedTuple):
    echoed: list[str]
    """What each answer begins with: its prompt, if it is to be repeated."""
    answers: list[Answer]
    firsts: list[Answer]
    """The first answer to each prompt."""


def _asked(call: Call) -> Asked:
    fields, model = call.fields, call.served.model
    _check(fields)
    options = {"max_tokens": MAX_TOKENS, **openai.options(fields), **openai.structure(fields)}
    if "logprobs" in fields:
        options["logprobs"] = fields["logprobs"]
        if fields.get("echo"):
            options["prompt_logprobs"] = fields["logprobs"]
    given, n = openai.texts(fields["prompt"], "prompt"), fields.get("n", 1)
    call.service.check_room(len(given) * n)  # before thousands of them are made ready
    prompts = openai.ids_of(model, given, "prompt")
    answers = [model.begin_ids(ids, **each) for ids in prompts for each in openai.each_seed(options, n)]
    echoed = [_text(model, prompt) if fields.get("echo") else "" for prompt in given for _ in range(n)]
    return Asked(echoed, answers, answers[::n])


def _text(model: Model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.detokenize(prompt)


def _check(fields: dict[str, Any]) -> None:
    openai.check_stream_options(fields)
    if fields.get("suffix"):
        raise RequestError(
            "suffix is given, but no model here fills in what is between two texts; expected none", param="suffix"
        )
    if fields.get("best_of", 1) not in (1, fields.get("n", 1)):
        raise RequestError("best_of is given, but all answers are told here; expected n instead", param="best_of")


async def _whole(call: Call, asked: Asked, answers: Answers) -> Response:
    async for _ in answers.events():
        pass
    return JSONResponse(
        {
            **openai.head("text_completion", "cmpl", call.served),
            "choices": [
                {"index": i, **told.more(done.text, len(done.ids)), "finish_reason": done.finish_reason}
                for i, (told, done) in enumerate(_told(call, asked))
            ],
            "usage": _usage(asked),
        }
    )


async def _chunks(call: Call, asked: Asked, answers: Answers) -> AsyncGenerator[bytes, None]:
    chunks = openai.Chunks(call, "text_completion", "cmpl")
    tellers = [told for told, _ in _told(call, asked)]

    def chunk(which: int, text: str, n_new: int = 0, reason: str | None = None) -> bytes:
        return chunks.of({"index": which, **tellers[which].more(text, n_new), "finish_reason": reason})

    async for told in answers.events():
        if told is None:
            yield PING
            continue
        which, event_ = told
        if isinstance(event_, Piece):
            yield chunk(which, event_.text, n_new=int(event_.id is not None))
        else:
            yield chunk(which, "", reason=event_.finish_reason)
    yield chunks.end(_usage(asked))


def _told(call: Call, asked: Asked) -> list[tuple[_Told, Completion]]:
    dones = [answer.completion for answer in asked.answers]
    return [(_Told(call, done, echoed), done) for done, echoed in zip(dones, asked.echoed, strict=True)]


class _Told:
    """How far an answer has been told, its prompt first if that is to be repeated."""

    def __init__(self, call: Call, done: Completion, echoed: str) -> None:
        self._tokenizer, self._done, self._echoed = call.served.model.tokenizer, done, echoed
        self._has_logprobs, self._echoes = "logprobs" in call.fields, bool(call.fields.get("echo"))
        self._is_begun, self._n, self._offset = False, 0, 0
        self._text = TextStream(self._tokenizer, () if self._echoes else done.prompt_ids)

    def more(self, text: str, n_new: int) -> dict[str, Any]:
        """The next text, of as many tokens, and what there is to say of them."""
        first = not self._is_begun and self._echoes
        self._is_begun = True
        told: dict[str, Any] = {"text": self._echoed + text if first else text, "logprobs": None}
        if self._has_logprobs:
            found: list[Logprob | None] = [None, *self._done.prompt_logprobs] if first else []
            told["logprobs"] = self._shape([*found, *self._done.logprobs[self._n : self._n + n_new]])
        self._n += n_new
        return told

    def _shape(self, found: Sequence[Logprob | None]) -> dict[str, Any]:
        """None is for the first token of a prompt, which nothing comes before."""
        shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in found:
            id = each.id if each else self._done.prompt_ids[0]
            shape["tokens"].append(openai.token_text(self._tokenizer, id))
            shape["token_logprobs"].append(openai.finite(each.logprob) if each else None)
            shape["top_logprobs"].append(self._top(each) if each else None)
            shape["text_offset"].append(self._offset)
            self._offset += len(self._text.push(id))
        return shape

    def _top(self, found: Logprob) -> dict[str, float]:
        """By their texts, the token that came among them; of tokens of one text the likeliest."""
        top: dict[str, float] = {}
        for id, logprob in [*found.top, (found.id, found.logprob)]:
            top.setdefault(openai.token_text(self._tokenizer, id), openai.finite(logprob))
        return top


def _usage(asked: Asked) -> dict[str, Any]:
    return openai.usage(asked.answers, [answer.completion for answer in asked.firsts])


ENDPOINTS = [
    Endpoint(
        "POST", ("/v1/completions", "/completions"), answering(_asked, _whole, _chunks), Object(FIELDS, ["prompt"])
    )
]
