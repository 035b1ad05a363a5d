"""What the endpoints of OpenAI's API have in common: fields of requests, and shapes of what is told."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from edgellm.answer import Answer, Completion
from edgellm.api import Model
from edgellm.errors import EdgeError
from edgellm.logprobs import Logprob
from edgellm.request import GRAMMARS
from edgellm.sampling import DEFAULTS, LARGEST, ORDER, RANGES
from edgellm.server.errors import RequestError
from edgellm.server.models import Served
from edgellm.server.schema import Anything, Duration, Either, Flag, Kind, ListOf, MapOf, Number, Object, Text, Whole
from edgellm.server.service import Call
from edgellm.server.streams import DONE, encode, event
from edgellm.tokenizer import Tokenizer

MOST_ANSWERS = 128
"""Of `n`."""
MOST_TOP = 20
"""Of the likeliest tokens that a client may ask for."""
NO_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has not; OpenAI's API does so too."""
MOST_TEXTS = 2048
"""Of one request: to embed, to rank, or as prompts; OpenAI's number."""
STOP = Text(most=1000)


def _sampler(name: str) -> Kind:
    return Whole(*map(int, RANGES[name])) if isinstance(DEFAULTS[name], int) else Number(*RANGES[name])


SAMPLING: dict[str, Kind] = {
    **{name: _sampler(name) for name in RANGES},
    "mirostat": Whole(0, 2),
    # Each is looked for in every token.
    "dry_sequence_breakers": ListOf(Text(most=40), most=16),
    "samplers": ListOf(Text(ORDER)),
    "seed": Whole(0, 2**64 - 1),
    "logit_bias": MapOf(Number(-LARGEST, LARGEST)),
}
"""OpenAI's and llama.cpp's fields of these names."""
COMMON: dict[str, Kind] = {
    "model": Text(),
    "keep_alive": Duration(),
    **SAMPLING,
    "n": Whole(1, MOST_ANSWERS),
    "stop": Either((STOP, ListOf(STOP, most=64))),
    "max_tokens": Whole(0),
    "stream": Flag(),
    "stream_options": Object({"include_usage": Flag(), "include_obfuscation": Flag()}),
    "speculate": Whole(0, 64),
    "ignore_eos": Flag(),
    # About the client; nothing is kept of them.
    "user": Text(),
    "metadata": MapOf(Anything()),
    "safety_identifier": Text(),
    "prompt_cache_key": Text(),
    "service_tier": Text(("auto", "default")),
}
TEXTS = Either((Text(), ListOf(Either((Text(), Whole(0), ListOf(Whole(0), least=1))), least=1)))
"""A text, its ids, or a list of either."""
JSON_SCHEMA = Either((MapOf(Anything()), Flag()))
STRUCTURE: dict[str, Kind] = {
    "regex": Text(),
    "choices": ListOf(Text(), least=1, most=1000),
    "grammar": Text(),
}
"""What an answer must be, beside JSON schemas."""
ANSWER = ("stop", "speculate", "ignore_eos", "max_tokens", *SAMPLING)


def texts(given: Any, at: str) -> list[str | list[int]]:
    """What was read as TEXTS, as a list; raises RequestError for a mixture, and for too many."""
    if isinstance(given, str):
        return [given]
    kinds = {type(each) for each in given}
    if len(kinds) > 1:
        raise RequestError(f"{at} has texts and tokens; expected a text, its ids, or a list of either", param=at)
    if kinds != {int} and len(given) > MOST_TEXTS:
        raise RequestError(
            f"{at} has {len(given)} texts; expected at most {MOST_TEXTS}: send them in several requests", param=at
        )
    return [given] if kinds == {int} else list(given)


def ids_of(model: Model, texts: Sequence[str | list[int]], at: str) -> list[list[int]]:
    """Texts, or ids of texts, which are checked; raises RequestError that names the one, as `at`[3]."""
    return [_ids(model, text, f"{at}[{i}]" if len(texts) > 1 else at) for i, text in enumerate(texts)]


def _ids(model: Model, text: str | list[int], at: str) -> list[int]:
    try:
        if isinstance(text, str):
            model.tokenizer.check_size(text, model.context_length)
        ids = model.tokenize(text) if isinstance(text, str) else text
        model.check_ids(ids)
    except EdgeError as error:
        refused = RequestError.of(error)
        raise RequestError(f"{at}: {error}", status=refused.status, param=at, code=refused.code) from error
    return ids


def options(fields: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of Model.stream that a request has."""
    given = {name: fields[name] for name in ANSWER if name in fields}
    if "logit_bias" in given:
        given["logit_bias"] = {_token(name): bias for name, bias in given["logit_bias"].items()}
    return given


def structure(fields: dict[str, Any]) -> dict[str, Any]:
    """Those of what an answer must be."""
    return {name: fields[name] for name in GRAMMARS if name in fields}


def _token(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) <= 10):
        raise RequestError(f"logit_bias has {name[:60]!r}; expected the ids of tokens", param="logit_bias")
    return int(name)


def each_seed(options: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Options for n answers: with a seed, that of the i-th is seed + i."""
    seed = options.get("seed")
    return [options if seed is None else {**options, "seed": (seed + i) % 2**64} for i in range(n)]


def check_stream_options(fields: dict[str, Any]) -> None:
    if "stream_options" in fields and not fields.get("stream"):
        raise RequestError("stream_options are given without stream; expected stream: true", param="stream_options")


def check_tools(fields: dict[str, Any], choice: str, structures: Sequence[str]) -> None:
    """Raise RequestError for what does not go together; `structures` are given fields that say what an answer is."""
    if fields.get("tool_choice", "none") != "none" and not fields.get("tools"):
        raise RequestError("tool_choice is given without tools; expected some tools", param="tool_choice")
    if not fields.get("tools") or choice == "none":
        return
    if fields.get("parallel_tool_calls") is False and choice == "auto":
        raise RequestError(
            "parallel_tool_calls is false, but a model that may call decides how often; expected a tool_choice that "
            "asks for one call, or true",
            param="parallel_tool_calls",
        )
    if structures:
        raise RequestError(
            f"{structures[0]} and tools are both given, but what must be so cannot be a call; expected one of them, or "
            "tool_choice none",
            param=structures[0],
        )


def head(object_: str, prefix: str, served: Served) -> dict[str, Any]:
    """What every answer, and every chunk of one, begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": object_,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": served.fingerprint,
    }


class Chunks:
    """What a stream tells: choices one by one, and at its end the usage, if that is asked for."""

    def __init__(self, call: Call, object_: str, prefix: str) -> None:
        self._head = head(object_, prefix, call.served)
        self._has_usage = call.fields.get("stream_options", {}).get("include_usage", False)
        chunk = event({**self._head, "choices": [], **({"usage": None} if self._has_usage else {})})
        self._before, _, self._after = chunk.rpartition(b"[]")

    def of(self, choice: dict[str, Any]) -> bytes:
        return b"%b[%b]%b" % (self._before, encode(choice).encode(), self._after)

    def end(self, usage: dict[str, Any]) -> bytes:
        return (event({**self._head, "choices": [], "usage": usage}) if self._has_usage else b"") + DONE


def usage(answers: Sequence[Answer], prompts: Sequence[Completion]) -> dict[str, Any]:
    """`prompts` are one answer for each prompt, which is counted once."""
    n_prompt = sum(each.timings.prompt_tokens for each in prompts)
    n_answer = sum(answer.completion.timings.generated_tokens for answer in answers)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": sum(each.timings.cached_tokens for each in prompts)},
    }


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token on its own; bytes that are no characters come out as U+FFFD."""
    return tokenizer.token_bytes(id).decode(errors="replace")


def finite(logprob: float) -> float:
    return max(logprob, NO_LOGPROB)


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[Logprob]) -> dict[str, Any]:
    """As chat completions have them."""

    def shape(id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}

    content = [
        {**shape(each.id, each.logprob), "top_logprobs": [shape(*other) for other in each.top]} for each in found
    ]
    return {"content": content, "refusal": None}
