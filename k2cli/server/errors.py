"""Errors of the HTTP API, all of them in OpenAI's form.

``{"error": {"message", "type", "param", "code"}}`` is what clients know how to show, whatever
went wrong: a missing route, a field of the wrong type, a wrong key, an engine that is gone.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from k2cli.protocol import RequestFailed

# Nothing receives it: the client has closed the connection. nginx logs such requests so.
CLIENT_CLOSED_REQUEST = 499
_INVALID = "invalid_request_error"
_SERVER = "server_error"
_HTTP_CODES = {
    404: ("unknown_url", "there is no such route"),
    405: ("method_not_allowed", "this route does not take that method"),
}
# Fields of OpenAI's API that would change the answer, and that k2 has not.
_NOT_OFFERED = {
    "audio": "answers are text",
    "function_call": "it was replaced by 'tool_choice'",
    "functions": "it was replaced by 'tools'",
    "moderation": "nothing here judges texts",
    "web_search_options": "this server reaches nothing beyond its ranks",
}


class ApiError(Exception):
    """A failure with its HTTP status and the members of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object that the client receives."""
        members = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": members}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def unavailable(cause: str) -> ApiError:
    """A 503: no run is ready, or it ended underneath the request."""
    return ApiError(503, cause, kind=_SERVER, code="engine_unavailable")


def engine_failure(failure: RequestFailed) -> ApiError:
    """The engine refused or broke off this one request."""
    match failure.kind:
        case "invalid":
            return ApiError(400, failure.error)
        case "capacity":
            return ApiError(429, failure.error, kind="rate_limit_error", code="over_capacity")
        case _:
            return ApiError(500, failure.error, kind=_SERVER, code="internal_error")


def validation_failure(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request body, with its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _field_path(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden" and param in _NOT_OFFERED:
        message = f"'{param}' is not supported: {_NOT_OFFERED[param]}"
        return invalid(message, param, "unsupported_parameter")
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field '{param}'", param, "unknown_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    if not param:
        return ApiError(400, f"the body is not a request: {reason}")
    return invalid(f"{param}: {reason}", param)


def _field_path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def install_error_handlers(app: Starlette) -> None:
    """Make the application answer every failure in OpenAI's form."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code, reason = _HTTP_CODES.get(error.status_code, (None, str(error.detail)))
        message = f"{reason}: {request.method} {request.url.path}"
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, message, code=code, headers=headers).response()

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again once this is sent, so that uvicorn logs the traceback.
        message = f"internal error: {type(error).__name__}"
        return ApiError(500, message, kind=_SERVER, code="internal_error").response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_bug)
