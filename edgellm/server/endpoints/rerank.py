"""Documents in the order in which they answer a query, as Jina's and Cohere's APIs have it.

A document's score is how likely the query is after it, token by token: with models that are trained to chat it finds
more than the angle between embeddings does.
"""

from __future__ import annotations

import math
import secrets
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from edgellm.api import Model
from edgellm.generate import common
from edgellm.ranking import Following
from edgellm.server import openai
from edgellm.server.endpoint import Endpoint
from edgellm.server.errors import RequestError
from edgellm.server.grouped import collected
from edgellm.server.schema import Duration, Either, Flag, Kind, ListOf, Object, Text, Whole
from edgellm.server.service import Call

BETWEEN = "\nQuestion:"
FIELDS: dict[str, Kind] = {
    "model": Text(),
    "keep_alive": Duration(),
    "query": Text(),
    "documents": ListOf(Either((Text(), Object({"text": Text()}, ["text"]))), least=1, most=openai.MOST_TEXTS),
    "top_n": Whole(1),
    "return_documents": Flag(),
}


async def rerank(call: Call) -> Response:
    fields, model = call.fields, (await call.load()).model
    documents = [each if isinstance(each, str) else each["text"] for each in fields["documents"]]
    asked = await run_in_threadpool(_following, model, documents, fields["query"])
    n_tokens = sum(len(each.ids) for each in asked)
    found = await collected(call, model.likelihood_groups(asked), n_tokens)
    best = sorted(range(len(found)), key=lambda i: -found[i])[: fields.get("top_n")]
    return JSONResponse(
        {
            "id": f"rerank-{secrets.token_hex(12)}",
            "object": "list",
            "model": call.served.name,
            "results": [_result(i, found[i], documents[i], fields.get("return_documents", False)) for i in best],
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }
    )


def _following(model: Model, documents: list[str], query: str) -> list[Following]:
    """The query after each document."""
    if not query.strip():
        raise RequestError("query is empty; expected a text", param="query")
    encode = partial(model.tokenize, parse_special=False)
    before = [f"{document}{BETWEEN}" for document in documents]
    ids = openai.ids_of(model, [encode(f"{text} {query}") for text in before], "documents")
    return [_after(each, encode(text)) for each, text in zip(ids, before, strict=True)]


def _after(ids: list[int], before: list[int]) -> Following:
    """A token that both texts have a part of counts as the query's."""
    return Following(ids, max(1, common(before, ids[:-1])))


def _result(index: int, logprob: float, document: str, is_told: bool) -> dict[str, Any]:
    """The score is the geometric mean of the probabilities of the query's tokens."""
    told = {"document": {"text": document}} if is_told else {}
    return {"index": index, "relevance_score": math.exp(logprob), **told}


PATHS = ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking")
ENDPOINTS = [Endpoint("POST", PATHS, rerank, Object(FIELDS, ["query", "documents"]))]
