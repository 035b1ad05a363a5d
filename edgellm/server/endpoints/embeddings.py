"""OpenAI's embeddings: directions that are similar for texts of similar meaning."""

from __future__ import annotations

import base64

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from edgellm.arrays import F32
from edgellm.embedding import POOLINGS
from edgellm.server import openai
from edgellm.server.embedding import check_dimensions, embedded, shortened
from edgellm.server.endpoint import Endpoint
from edgellm.server.schema import Duration, Kind, Object, Text, Whole
from edgellm.server.service import Call

FIELDS: dict[str, Kind] = {
    "model": Text(),
    "keep_alive": Duration(),
    "input": openai.TEXTS,
    "encoding_format": Text(("float", "base64")),
    "dimensions": Whole(1),
    "pooling": Text(POOLINGS),
    "user": Text(),
}


async def embed(call: Call) -> Response:
    """`pooling` is ours: "last" for models that are trained for it."""
    fields, model = call.fields, (await call.load()).model
    check_dimensions(model, fields.get("dimensions"))
    texts = await run_in_threadpool(openai.ids_of, model, openai.texts(fields["input"], "input"), "input")
    vectors = await embedded(call, texts, fields.get("pooling", "mean"))
    return await run_in_threadpool(_told, call, vectors, sum(map(len, texts)))


def _told(call: Call, vectors: list[F32], n_tokens: int) -> Response:
    fields = call.fields
    shown = _base64 if fields.get("encoding_format") == "base64" else _list
    data = [
        {"object": "embedding", "index": i, "embedding": shown(shortened(each, fields.get("dimensions")))}
        for i, each in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return JSONResponse({"object": "list", "data": data, "model": call.served.name, "usage": usage})


def _list(vector: F32) -> list[float]:
    return vector.tolist()  # type: ignore[no-any-return]


def _base64(vector: F32) -> str:
    """Of float32, the lowest byte first."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


ENDPOINTS = [Endpoint("POST", ("/v1/embeddings", "/embeddings"), embed, Object(FIELDS, ["input"]))]
