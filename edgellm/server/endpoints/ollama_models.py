"""Ollama's account of the models that there are; what would change them is refused."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from edgellm import __version__
from edgellm.chat_template import ChatTemplate
from edgellm.errors import EdgeError
from edgellm.file import ModelInfo
from edgellm.loading import open_model
from edgellm.server.endpoint import Endpoint
from edgellm.server.endpoints.ollama import Name
from edgellm.server.errors import RequestError
from edgellm.server.models import Models
from edgellm.server.schema import Flag, Object
from edgellm.server.service import Call

NEVER = datetime(9999, 12, 31, tzinfo=timezone.utc)
"""When a model is unloaded that stays."""
MOST_SECONDS = 1e10
"""Some three hundred years: what is longer may be no date."""


@dataclass(frozen=True)
class Facts:
    """What a file says of its model."""

    info: ModelInfo
    config: Any
    n_bytes: int
    fingerprint: str
    n_weights: int
    format: str
    """Of most of the weights."""

    @property
    def details(self) -> dict[str, Any]:
        family = self.info.architecture
        return {
            "parent_model": "",
            "format": "edge",
            "family": family,
            "families": [family],
            "parameter_size": _size(self.n_weights),
            "quantization_level": self.format.upper(),
        }


@lru_cache(256)
def _facts(path: Path, changed: int) -> Facts:
    """Of a file that was last changed then."""
    loaded = open_model(path)
    file, formats = loaded.file, Counter[str]()
    try:
        for tensor in file.tensors.values():
            formats[tensor.format] += math.prod(tensor.shape)
        (format_, _), *_ = formats.most_common(1)
        return Facts(file.info, loaded.config, file.n_bytes, file.fingerprint, formats.total(), format_)
    finally:
        file.close()


def _known(models: Models, name: str) -> dict[str, Any] | None:
    """What lists have of a model; None if its file is gone, or damaged. It may read the file."""
    try:
        path = models.known()[name]
        changed = path.stat().st_mtime_ns
        facts = _facts(path, changed)
    except (EdgeError, OSError, KeyError):
        return None
    return {
        "name": name,
        "model": name,
        "modified_at": _time(changed / 1e9),
        "size": facts.n_bytes,
        "digest": facts.fingerprint,
        "details": facts.details,
    }


async def tags(call: Call) -> Response:
    models = call.service.models
    found = [await run_in_threadpool(_known, models, name) for name in models.known()]
    return JSONResponse({"models": [each for each in found if each]})


async def ps(call: Call) -> Response:
    """Those that are loaded."""
    models = call.service.models
    found = []
    for name, served in list(models.loaded.items()):
        left = served.seconds_left
        until = NEVER.isoformat() if left > MOST_SECONDS else _time(time.time() + left)
        if known := await run_in_threadpool(_known, models, name):
            known["size"] = served.n_bytes
            found.append({**known, "expires_at": until, "size_vram": 0, "context_length": served.model.context_length})
    return JSONResponse({"models": found})


async def show(call: Call) -> Response:
    """From the file: a model is not loaded for that."""
    fields, models = call.fields, call.service.models
    if "model" not in fields and "name" not in fields:
        raise RequestError("model is missing; expected a text")
    name = models.name_of(fields.get("model", fields.get("name")))
    return JSONResponse(await run_in_threadpool(_shown, name, models.known()[name]))


def _shown(name: str, path: Path) -> dict[str, Any]:
    changed = path.stat().st_mtime_ns
    facts = _facts(path, changed)
    return {
        "modelfile": f"FROM {name}",
        "parameters": "",
        "template": facts.info.chat_template or "{{ .Prompt }}",
        "license": facts.info.license,
        "details": facts.details,
        "model_info": _info(facts),
        "capabilities": _capabilities(facts.info.chat_template),
        "modified_at": _time(changed / 1e9),
    }


def _info(facts: Facts) -> dict[str, Any]:
    """By GGUF's names."""
    config, family = facts.config, facts.info.architecture
    sizes = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.n_layers,
        "vocab_size": config.vocab_size,
    }
    return {
        "general.architecture": family,
        "general.name": facts.info.name,
        "general.parameter_count": facts.n_weights,
        **{f"{family}.{name}": size for name, size in sizes.items()},
    }


def _capabilities(source: str | None) -> list[str]:
    if source is None:
        return ["completion"]
    try:
        thinks = ChatTemplate(source).may_think
    except EdgeError:
        return ["completion"]
    return ["completion", "tools", *(["thinking"] if thinks else [])]


async def version(call: Call) -> Response:
    return JSONResponse({"version": __version__})


def _size(n_weights: int) -> str:
    """As Ollama writes it: 134.5M, 1.2B."""
    size, unit = next(((n, u) for n, u in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if n_weights >= n), (1, ""))
    return f"{n_weights / size:.4g}{unit}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def _elsewhere(method: str, path: str, instead: str) -> Endpoint:
    """What is not done over HTTP: models are files of the machine's owner."""

    async def refuse(call: Call) -> Response:
        raise RequestError(f"{path} is not done over HTTP here; {instead}", status=403)

    return Endpoint(method, (path,), refuse)


ENDPOINTS = [
    Endpoint("GET", ("/api/tags",), tags),
    Endpoint("GET", ("/api/ps",), ps),
    Endpoint("GET", ("/api/version",), version),
    Endpoint("POST", ("/api/show",), show, Object({"model": Name(), "name": Name(), "verbose": Flag()})),
    _elsewhere("POST", "/api/pull", "on the server's machine run edgellm pull NAME"),
    _elsewhere("POST", "/api/push", "on the server's machine run edgellm export NAME FILE, and publish that"),
    _elsewhere("POST", "/api/create", "on the server's machine run edgellm convert SOURCE FILE, and serve that"),
    _elsewhere("POST", "/api/copy", "copy the file, and serve that: edgellm serve FILE"),
    _elsewhere("DELETE", "/api/delete", "on the server's machine run edgellm rm NAME"),
]
