"""How the server is: for supervisors, for Prometheus, and for clients that ask what it can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from edgellm import __version__
from edgellm.answer import Answer
from edgellm.sampling import DEFAULTS
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.models import Served
from edgellm.server.openai import SAMPLING
from edgellm.server.service import RETRY_AFTER, Call


async def health(call: Call) -> Response:
    return JSONResponse({"status": "ok", "models_loaded": len(call.service.models.loaded)})


async def ready(call: Call) -> Response:
    """Whether one more answer would be taken in."""
    service = call.service
    if service.room < 1:
        raise RequestError(
            "every slot and every place in the queue is taken; expected a free one: ask again later",
            status=503, headers={"retry-after": str(RETRY_AFTER)},
        )  # fmt: skip
    return JSONResponse(
        {
            "status": "ready", "answers": service.under_way, "room": service.room,
            "models_loaded": len(service.models.loaded),
        }
    )  # fmt: skip


async def metrics(call: Call) -> Response:
    text = call.service.metrics.text(call.service.gauges())
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def props(call: Call) -> Response:
    """As llama.cpp's server tells them."""
    model, models = (await call.load()).model, call.service.models
    return JSONResponse(
        {
            "default_generation_settings": {
                "n_ctx": model.context_length,
                "params": {name: DEFAULTS[name] for name in SAMPLING if name in DEFAULTS and name != "logit_bias"},
            },
            "total_slots": model.at_once,
            "model_alias": call.served.name,
            "model_backend": model.backend_name,
            "chat_template": model.info.chat_template,
            "build_info": f"edgellm {__version__}",
            "models": {name: models.status(name) for name in models.known()},
        }
    )


async def slots(call: Call) -> Response:
    """As llama.cpp's server tells them, without texts: those of a model, or of all that are loaded."""
    models = call.service.models
    asked = [models.name_of(call.params["model"])] if "model" in call.params else list(models.loaded)
    found = [slot for name in asked if name in models.loaded for slot in _slots(models.loaded[name])]
    if call.params.get("fail_on_no_slot") and all(slot["is_processing"] for slot in found):
        raise RequestError("no slot is free; expected one: ask again later", status=503)
    return JSONResponse(found)


def _slots(served: Served) -> Iterator[dict[str, Any]]:
    model = served.model
    answers = model.under_way()
    for i in range(model.at_once):
        answer = answers[i] if i < len(answers) else None
        slot = {"id": i, "model": served.name, "n_ctx": model.context_length, "is_processing": answer is not None}
        yield {**slot, **_progress(answer)} if answer else slot


def _progress(answer: Answer) -> dict[str, Any]:
    timings, most = answer.completion.timings, answer.max_tokens
    n_remain = -1 if most is None else most - timings.generated_tokens
    return {
        "speculative": answer.lookup is not None,
        "n_prompt_tokens": timings.prompt_tokens,
        "n_prompt_tokens_cache": timings.cached_tokens,
        "next_token": {"has_next_token": True, "n_remain": n_remain, "n_decoded": timings.generated_tokens},
    }


ENDPOINTS = [
    Endpoint("GET", ("/health", "/v1/health"), health),
    Endpoint("GET", ("/ready",), ready),
    Endpoint("GET", ("/metrics",), metrics),
    Endpoint("GET", ("/props",), props),
    Endpoint("GET", ("/slots",), slots),
]
