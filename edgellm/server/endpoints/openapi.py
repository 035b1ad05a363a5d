"""What there is to ask, in OpenAPI's words: made of what the endpoints themselves check."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import JSONResponse, Response

from edgellm import __version__
from edgellm.server import endpoints, errors
from edgellm.server.endpoint import Endpoint
from edgellm.server.service import Call

OPENAI = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
OLLAMA = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
ERRORS: dict[errors.Shape, tuple[str, dict[str, Any]]] = {
    errors.openai: ("Error", OPENAI),
    errors.anthropic: ("AnthropicError", ANTHROPIC),
    errors.ollama: ("OllamaError", OLLAMA),
}


async def description(call: Call) -> Response:
    paths: dict[str, dict[str, Any]] = {}
    for each in endpoints.endpoints():
        for path in each.paths:
            paths.setdefault(path.replace(":path}", "}"), {})[each.method.lower()] = _operation(each, path)
    return JSONResponse(
        {
            "openapi": "3.1.0",
            "info": {"title": "edgellm", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": dict(ERRORS.values()),
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"key": []}],
        }
    )


def _operation(endpoint: Endpoint, path: str) -> dict[str, Any]:
    name, _ = ERRORS[errors.shape(path)]
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    made: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer."},
            "default": {"description": "Why there is none.", "content": error},
        }
    }
    names = re.findall(r"{(\w+)", path)
    made["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    if endpoint.body:
        content = {"application/json": {"schema": endpoint.body.schema()}}
        made["requestBody"] = {"required": True, "content": content}
    return made


ENDPOINTS = [Endpoint("GET", ("/openapi.json",), description)]
