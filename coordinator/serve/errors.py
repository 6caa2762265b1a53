"""Errors as OpenAI's API has them: {"error": {message, type, param, code}} with an HTTP status."""

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from warmfront.shared.errors import BusyError, ModelError, UsageError, WarmfrontError

__all__ = ["ApiError", "as_api_error", "invalid"]

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error"}
_RETRY_S = 2  # when a client that was sent away may come again


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that carries it."""
        headers = {"Retry-After": str(_RETRY_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def invalid(message: str, param: str | None = None) -> ApiError:
    """A request that makes no sense."""
    return ApiError(400, message, param=param)


def as_api_error(error: Exception) -> ApiError:
    """What a client may know of `error`: nothing of what is the server's own affair."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # Further names may be those of alternatives, which no client knows.
        param = str(first["loc"][0]) if first["loc"] else None
        return invalid(f"{param}: {first['msg']}" if param else first["msg"], param)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, UsageError):
        too_long = "the context holds" in str(error)
        return ApiError(400, str(error), code="context_length_exceeded" if too_long else None)
    if isinstance(error, ModelError):  # such as a template that refuses the messages
        return invalid(str(error))
    if isinstance(error, WarmfrontError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
