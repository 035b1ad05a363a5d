"""OpenAI's list of models, which has what Anthropic's has, too."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from edgellm.server.endpoint import Endpoint
from edgellm.server.models import Models
from edgellm.server.service import Call


async def all_(call: Call) -> Response:
    models = call.service.models
    data = [await run_in_threadpool(_model, models, name) for name in models.known()]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return JSONResponse({"object": "list", "data": data, "has_more": False, **ends})


async def one(call: Call) -> Response:
    models = call.service.models
    return JSONResponse(await run_in_threadpool(_model, models, models.name_of(call.params["name"])))


def _model(models: Models, name: str) -> dict[str, Any]:
    """The status is as llama.cpp's server has it."""
    created = models.changed(name)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, timezone.utc).isoformat(),
        "owned_by": "edgellm",
        "max_model_len": models.context_length(name),
        "status": {"value": models.status(name)},
    }


ENDPOINTS = [
    Endpoint("GET", ("/v1/models", "/models"), all_),
    Endpoint("GET", ("/v1/models/{name:path}", "/models/{name:path}"), one),
]
