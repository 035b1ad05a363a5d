"""What a client is told when a request fails: a status, a sentence, and the field that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import JSONResponse

from edgellm.errors import (
    ArgumentError,
    ChatTemplateError,
    ContextOverflowError,
    EdgeError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)

Shape = Callable[["RequestError"], dict[str, Any]]
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 503: "unavailable_error",
    504: "timeout_error",
}  # fmt: skip
ANTHROPIC_TYPES = {
    **TYPES, 413: "request_too_large", 503: "overloaded_error",
}  # fmt: skip
STATUSES: dict[type[EdgeError], tuple[int, str | None]] = {
    ArgumentError: (400, None),
    ContextOverflowError: (400, "context_length_exceeded"),
    UnsupportedError: (400, "unsupported"),
    ChatTemplateError: (400, "chat_template"),
    ModelNotFoundError: (404, "model_not_found"),
    OutOfMemoryError: (503, None),
}
"""Status and code; an error of the server's own making, a damaged file for one, is a 500."""


class RequestError(EdgeError):
    """A request that is not answered."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: EdgeError) -> RequestError:
        """What any error of edgellm is to a client."""
        if isinstance(error, RequestError):
            return error
        status, code = next((known for kind, known in STATUSES.items() if isinstance(error, kind)), (500, None))
        return cls(str(error), status=status, code=code)


def openai(error: RequestError) -> dict[str, Any]:
    type_ = TYPES.get(error.status, "server_error")
    return {"error": {"message": str(error), "type": type_, "param": error.param, "code": error.code}}


def anthropic(error: RequestError) -> dict[str, Any]:
    type_ = ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": type_, "message": str(error)}}


def ollama(error: RequestError) -> dict[str, Any]:
    return {"error": str(error)}


def shape(path: str) -> Shape:
    """In which clients of the API that has the path read errors."""
    return anthropic if path.startswith("/v1/messages") else ollama if path.startswith("/api/") else openai


def refusal(error: RequestError, path: str) -> JSONResponse:
    return JSONResponse(shape(path)(error), error.status, error.headers)
