"""How the server is: for supervisors, for Prometheus, and for clients that ask what it can."""

from __future__ import annotations

from starlette.responses import JSONResponse, PlainTextResponse, Response

from edgellm import __version__
from edgellm.sampling import DEFAULTS
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.openai import SAMPLING
from edgellm.server.service import RETRY_AFTER, Call


async def health(call: Call) -> Response:
    return JSONResponse({"status": "ok"})


async def ready(call: Call) -> Response:
    """Whether one more answer would be taken in."""
    service = call.service
    if service.room < 1:
        raise RequestError(
            "every slot and every place in the queue is taken; expected a free one: ask again later",
            status=503, headers={"retry-after": str(RETRY_AFTER)},
        )  # fmt: skip
    return JSONResponse({"status": "ready", "answers": service.under_way, "room": service.room})


async def metrics(call: Call) -> Response:
    text = call.service.metrics.text(call.service.gauges())
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def props(call: Call) -> Response:
    """As llama.cpp's server tells them."""
    model = call.served.model
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
        }
    )


ENDPOINTS = [
    Endpoint("GET", ("/health", "/v1/health"), health),
    Endpoint("GET", ("/ready",), ready),
    Endpoint("GET", ("/metrics",), metrics),
    Endpoint("GET", ("/props",), props),
]
