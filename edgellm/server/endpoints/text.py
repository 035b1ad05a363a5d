"""Text and tokens, as llama.cpp's server and vLLM have it, for clients that count tokens or see prompts."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.messages import MESSAGES, TOOLS, messages_of
from edgellm.server.schema import MOST_CHARACTERS, Flag, ListOf, Object, Text, Whole
from edgellm.server.service import Call

TEXT = Text(most=MOST_CHARACTERS)
TOKENIZE = Object(
    {
        "model": Text(), "content": TEXT, "prompt": TEXT, "add_special": Flag(), "add_special_tokens": Flag(),
        "parse_special": Flag(), "with_pieces": Flag(),
    }
)  # fmt: skip


async def tokenize(call: Call) -> Response:
    """`content` is llama.cpp's, without BOS unless it is asked for; `prompt` is vLLM's, with it unless it is not."""
    fields = call.fields
    if ("content" in fields) == ("prompt" in fields):
        raise RequestError("content or prompt must be given; expected one of them", param="content")
    asked = fields.get("add_special", fields.get("add_special_tokens", "prompt" in fields))
    text, parse = fields.get("content", fields.get("prompt", "")), fields.get("parse_special", True)
    model = (await call.load()).model
    ids = await run_in_threadpool(model.tokenize, text, add_special=asked, parse_special=parse)
    tokens = [_piece(call, id) for id in ids] if fields.get("with_pieces") else ids
    return JSONResponse({"tokens": tokens, "count": len(ids), "max_model_len": model.context_length})


def _piece(call: Call, id: int) -> dict[str, Any]:
    """Bytes that are no characters of their own are told as numbers."""
    raw = call.served.model.tokenizer.token_bytes(id)
    try:
        return {"id": id, "piece": raw.decode()}
    except UnicodeDecodeError:
        return {"id": id, "piece": list(raw)}


async def detokenize(call: Call) -> Response:
    tokenizer = (await call.load()).model.tokenizer
    text = await run_in_threadpool(tokenizer.decode, call.fields["tokens"], skip_special=False)
    return JSONResponse({"content": text, "prompt": text})


async def tokenizer_info(call: Call) -> Response:
    """What lm-evaluation-harness asks, in place of a tokenizer of its own."""
    model = (await call.load()).model
    eos = model.info.eos_ids[0] if model.info.eos_ids else None
    bos_token, eos_token = (None if id is None else model.tokenizer.id_to_token(id) for id in (model.info.bos_id, eos))
    return JSONResponse(
        {
            "name_or_path": call.served.name, "bos_token": bos_token, "eos_token": eos_token, "pad_token": eos_token,
            "chat_template": model.info.chat_template,
        }
    )  # fmt: skip


async def apply_template(call: Call) -> Response:
    messages, tools = messages_of(call.fields["messages"]), call.fields.get("tools", ())
    generates = call.fields.get("add_generation_prompt", True)
    served = await call.load()
    text = await run_in_threadpool(served.template.render, messages, generates, tools)
    return JSONResponse({"prompt": text})


ENDPOINTS = [
    Endpoint("POST", ("/tokenize",), tokenize, TOKENIZE),
    Endpoint("POST", ("/detokenize",), detokenize, Object({"model": Text(), "tokens": ListOf(Whole(0))}, ["tokens"])),
    Endpoint("GET", ("/tokenizer_info",), tokenizer_info),
    Endpoint(
        "POST",
        ("/apply-template",),
        apply_template,
        Object({"model": Text(), "messages": MESSAGES, "tools": TOOLS, "add_generation_prompt": Flag()}, ["messages"]),
    ),
]
