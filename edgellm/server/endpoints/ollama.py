"""Ollama's answers, to chats and to prompts, and its embeddings."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from edgellm.api import Model
from edgellm.arrays import F32
from edgellm.chat import Question
from edgellm.server import openai, turn
from edgellm.server.embedding import check_dimensions, embedded, shortened
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError, ollama
from edgellm.server.messages import TOOLS
from edgellm.server.schema import (
    MOST_CHARACTERS,
    Anything,
    Duration,
    Either,
    Flag,
    Kind,
    ListOf,
    MapOf,
    Object,
    Text,
    Whole,
)
from edgellm.server.service import Answers, Call
from edgellm.server.streams import Wire, answering, encode
from edgellm.server.turn import Asked, Called, Part, Prompt


class Name(Text):
    """Of a model; what Ollama puts behind it is left out."""

    def read(self, value: Any, at: str) -> str:
        return super().read(value, at).removesuffix(":latest")


IMAGES = ListOf(Anything())
CALL = Object(
    {
        "id": Text(),
        "type": Text(("function",)),
        "function": Object(
            {"index": Anything(), "name": Text(), "arguments": MapOf(Anything())}, ["name", "arguments"]
        ),
    },
    ["function"],
)
MESSAGE = Object(
    {
        "role": Text(("system", "user", "assistant", "tool")),
        "content": Text(),
        "thinking": Text(),
        "images": IMAGES,
        "tool_calls": ListOf(CALL),
        "tool_name": Text(),
        "tool_call_id": Text(),
    },
    ["role"],
)
WHOLE = Whole(-(2**63), 2**63 - 1)
OPTIONS: dict[str, Kind] = {
    **openai.SAMPLING,
    "seed": Whole(-(2**63), 2**64 - 1),
    "repeat_last_n": Whole(-1, 2**31 - 1),
    "num_predict": Whole(-2, 2**31 - 1),
    "num_ctx": Whole(1, 2**31 - 1),
    "stop": openai.COMMON["stop"],
    # They change no answer here: about the machine, and what is kept where a prompt is cut, which is never done.
    **dict.fromkeys(("num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread"), WHOLE),
    **dict.fromkeys(("use_mmap", "use_mlock", "numa", "low_vram"), Flag()),
}
COMMON: dict[str, Kind] = {"model": Name(), "options": Object(OPTIONS), "keep_alive": Duration()}
ANSWER: dict[str, Kind] = {
    **COMMON,
    "format": Either((Text(("", "json")), MapOf(Anything()))),
    "stream": Flag(),
    "think": Flag(),
    "logprobs": Flag(),
    "top_logprobs": Whole(0, openai.MOST_TOP),
}
CHAT = {**ANSWER, "messages": ListOf(MESSAGE), "tools": TOOLS}
GENERATE = {
    **ANSWER,
    "prompt": Text(),
    "system": Text(),
    "raw": Flag(),
    "suffix": Text(),
    "template": Text(),
    "context": ListOf(Whole(0)),
    "images": IMAGES,
}
NOT_HERE = {
    "suffix": "no model here fills in what is between two texts",
    "template": "models have their own templates; raw takes a prompt as it is",
    "context": "turns before this one are messages of /api/chat",
    "images": "no model here sees images",
}


def _options(fields: dict[str, Any], model: Model) -> dict[str, Any]:
    """The keyword arguments of Model.stream."""
    given = dict(fields.get("options", {}))
    if given.get("seed", 0) < 0:
        del given["seed"]
    if given.get("repeat_last_n") == -1:
        given["repeat_last_n"] = model.context_length
    options = openai.options(given)
    if given.get("num_predict", 0) > 0:
        options["max_tokens"] = given["num_predict"]
    if format_ := fields.get("format"):
        options["json_schema"] = {"type": "object"} if format_ == "json" else format_
    if fields.get("logprobs"):
        options["logprobs"] = fields.get("top_logprobs", 0)
    return options


def _check(given: Mapping[str, Any], at: str = "") -> None:
    """What would change an answer, and is not done here."""
    for name, why in NOT_HERE.items():
        if given.get(name):
            raise RequestError(f"{at}{name} is given, but {why}; expected none")


def _ask(call: Call, prompt: Prompt) -> Asked:
    fields, model = call.fields, call.served.model
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        raise RequestError("top_logprobs is given without logprobs; expected logprobs: true")
    most = fields.get("options", {}).get("num_ctx", model.context_length)
    return turn.ask(call, prompt, _options(fields, model), most=most)


def _chat(call: Call) -> Asked:
    fields = call.fields
    if fields.get("tools") and fields.get("format"):
        raise RequestError(
            "format and tools are both given, but what must be so cannot be a call; expected one of them"
        )
    messages = _messages(fields["messages"])
    is_begun = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    if is_begun and fields.get("format"):
        raise RequestError(
            "format is given, but the last message is the beginning of an answer, and what it must be holds from its "
            "beginning; expected a last message of the user"
        )
    begun, tools = messages.pop() if is_begun else None, fields.get("tools", ())
    return _ask(call, turn.prompt(call, messages, begun=begun, tools=tools, thinks=fields.get("think")))


def _messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As chat templates want to see them."""
    calls: list[dict[str, Any]] = []
    return [_message(each, i, calls) for i, each in enumerate(given)]


def _message(given: dict[str, Any], index: int, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """`calls` are those without a result yet."""
    _check(given, f"messages[{index}].")
    message = {"role": given["role"], "content": given.get("content", "")}
    if given["role"] == "tool":
        return {**message, **_answered(given, calls)}
    if given.get("thinking"):
        message["reasoning_content"] = given["thinking"]
    if given.get("tool_calls"):
        message["tool_calls"] = [_call(each, f"call{index:03}{i:02}") for i, each in enumerate(given["tool_calls"])]
        calls += message["tool_calls"]
    return message


def _answered(given: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, str]:
    """Of a result its call's id and name: Ollama's clients know them by one of these, or by their order."""
    known = {key: given[name] for key, name in (("id", "tool_call_id"), ("name", "tool_name")) if name in given}
    for call in calls:
        asked = {"id": call["id"], "name": call["function"]["name"]}
        if known.items() <= asked.items():
            calls.remove(call)
            known = asked
            break
    return {{"id": "tool_call_id"}.get(key, key): value for key, value in known.items()}


def _call(given: dict[str, Any], id: str) -> dict[str, Any]:
    function = {name: given["function"][name] for name in ("name", "arguments")}
    return {"type": "function", "id": given.get("id", id), "function": function}


def _generate(call: Call) -> Asked:
    fields, model = call.fields, call.served.model
    _check(fields)
    text, thinks = fields["prompt"], fields.get("think")
    if fields.get("raw") or model.info.chat_template is None:
        if "system" in fields or thinks:
            given = "system" if "system" in fields else "think"
            raise RequestError(f"{given} is given, but the prompt has no template; expected none, or another model")
        return _ask(call, Prompt(Question(model.tokenize(text)), None))
    system = [{"role": "system", "content": fields["system"]}] if "system" in fields else []
    return _ask(call, turn.prompt(call, [*system, {"role": "user", "content": text}], thinks=thinks))


class _Teller:
    """An answer in Ollama's words: of a chat, or to a prompt."""

    def __init__(self, call: Call) -> None:
        self._call, self._is_chat = call, "messages" in call.fields

    def more(self, parts: Sequence[Part] = (), calls: Sequence[Called] = (), **others: Any) -> dict[str, Any]:
        """Some of it, or all."""
        said, thought = ("".join(part.text for part in parts if part.is_thought is kind) for kind in (False, True))
        shown: dict[str, Any] = {"content" if self._is_chat else "response": said}
        if thought:
            shown["thinking"] = thought
        if calls:
            shown["tool_calls"] = [_shown(i, each) for i, each in enumerate(calls)]
        if self._is_chat:
            shown = {"message": {"role": "assistant", **shown}}
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        return {"model": self._call.fields["model"], "created_at": now, **shown, "done": False, **others}

    def logprobs(self, asked: Asked, begin: int, end: int) -> dict[str, Any]:
        """Of some of its tokens, if they are asked for."""
        if not self._call.fields.get("logprobs") or begin == end:
            return {}
        found = asked.answers[0].completion.logprobs[begin:end]
        return {"logprobs": openai.chat_logprobs(self._call.served.model.tokenizer, found)["content"]}

    def done(self, asked: Asked, reason: str) -> dict[str, Any]:
        timings = asked.answers[0].completion.timings
        return {
            "done": True,
            "done_reason": "length" if reason == "length" else "stop",
            **_durations(self._call),
            "prompt_eval_count": timings.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(timings.prompt_seconds),
            "eval_count": timings.generated_tokens,
            "eval_duration": _nanoseconds(timings.generate_seconds),
        }


def _shown(index: int, called: Called) -> dict[str, Any]:
    function = {"index": index, "name": called.call.name, "arguments": called.call.arguments}
    return {"id": called.id, "function": function}


def _durations(call: Call) -> dict[str, int]:
    total = time.perf_counter() - call.started
    return {"total_duration": _nanoseconds(total), "load_duration": _nanoseconds(call.load_seconds)}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


async def _whole(call: Call, asked: Asked, answers: Answers) -> Response:
    teller, (said,) = _Teller(call), await turn.said(asked, answers)
    parts = [Part(True, said.thoughts), Part(False, said.text)]
    logprobs = teller.logprobs(asked, 0, len(asked.answers[0].completion.ids))
    return JSONResponse(teller.more(parts, said.calls, **logprobs, **teller.done(asked, said.reason)))


async def _chunks(call: Call, asked: Asked, answers: Answers) -> AsyncGenerator[bytes, None]:
    teller, n_told = _Teller(call), 0
    async for news in turn.told(asked, answers):
        if news is None:
            continue  # a line can be nothing but an answer
        logprobs, n_told = teller.logprobs(asked, n_told, n_told + news.n_tokens), n_told + news.n_tokens
        calls = news.end.calls if news.end else []
        if news.parts or calls or logprobs:
            yield _line(teller.more(news.parts, calls, **logprobs))
        if news.end:
            yield _line(teller.more(**teller.done(asked, news.end.reason)))


def _line(value: Any) -> bytes:
    return f"{encode(value)}\n".encode()


WIRE = Wire("application/x-ndjson", lambda error: _line(ollama(error)), is_default=True)
_answer_chat = answering(_chat, _whole, _chunks, WIRE)
_answer_prompt = answering(_generate, _whole, _chunks, WIRE)


async def chat(call: Call) -> Response:
    return await (_answer_chat(call) if call.fields.get("messages") else _loaded(call))


async def generate(call: Call) -> Response:
    return await (_answer_prompt(call) if call.fields.get("prompt") else _loaded(call))


async def _loaded(call: Call) -> Response:
    """Nothing is asked but that the model be loaded, or unloaded."""
    models, leaves = call.service.models, call.fields.get("keep_alive") == 0
    if models.name_of(call.fields["model"]) in models.loaded or not leaves:
        await call.load()
    return JSONResponse(_Teller(call).more(done=True, done_reason="unload" if leaves else "load"))


async def embed(call: Call) -> Response:
    fields, given = call.fields, call.fields["input"]
    vectors, n_tokens = await _embedded(call, [given] if isinstance(given, str) else given)
    embeddings = [shortened(each, fields.get("dimensions")).tolist() for each in vectors]
    told = {"model": fields["model"], "embeddings": embeddings, **_durations(call), "prompt_eval_count": n_tokens}
    return await run_in_threadpool(JSONResponse, told)


async def embed_one(call: Call) -> Response:
    """As Ollama had it first."""
    vectors, _ = await _embedded(call, [call.fields["prompt"]])
    return JSONResponse({"embedding": vectors[0].tolist()})


async def _embedded(call: Call, texts: list[str]) -> tuple[list[F32], int]:
    """The vectors of texts, and how many tokens these have."""
    model = (await call.load()).model
    check_dimensions(model, call.fields.get("dimensions"))
    ids = await run_in_threadpool(_ids, model, texts, call.fields.get("truncate", False))
    return await embedded(call, ids), sum(map(len, ids))


def _ids(model: Model, texts: list[str], truncates: bool) -> list[list[int]]:
    cut = [model.tokenize(text)[: model.context_length] for text in texts] if truncates else texts
    return openai.ids_of(model, cut, "input")


# It is cut by its tokens, so all of it is encoded.
TEXT = Text(most=MOST_CHARACTERS)
EMBED = {
    **COMMON,
    "input": Either((TEXT, ListOf(TEXT, most=openai.MOST_TEXTS))),
    "truncate": Flag(),
    "dimensions": Whole(1),
}
ENDPOINTS = [
    Endpoint("POST", ("/api/chat",), chat, Object(CHAT, ["model"])),
    Endpoint("POST", ("/api/generate",), generate, Object(GENERATE, ["model"])),
    Endpoint("POST", ("/api/embed",), embed, Object(EMBED, ["model", "input"])),
    Endpoint("POST", ("/api/embeddings",), embed_one, Object({**COMMON, "prompt": Text()}, ["model", "prompt"])),
]
