"""OpenAI's list of models."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from edgellm.server.endpoint import Endpoint
from edgellm.server.service import Call, Served


async def all_(call: Call) -> Response:
    return JSONResponse({"object": "list", "data": [_model(each) for each in call.service.models.values()]})


async def one(call: Call) -> Response:
    return JSONResponse(_model(call.service.served(call.params["name"])))


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "edgellm",
        "max_model_len": served.model.context_length,
    }


ENDPOINTS = [
    Endpoint("GET", ("/v1/models", "/models"), all_),
    Endpoint("GET", ("/v1/models/{name:path}", "/models/{name:path}"), one),
]
