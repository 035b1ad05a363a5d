"""What a client is told when a request fails: a status, a sentence, and the field that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
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

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 503: "unavailable_error",
    504: "timeout_error",
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

    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        type_ = TYPES.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": type_, "param": self.param, "code": self.code}}


def refusal(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)
