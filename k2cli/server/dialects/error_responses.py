"""Errors in the form of the API that a request is written for: OpenAI's or Anthropic's.

A request is one of Anthropic's by its path, or by the header ``anthropic-version``, which all of
its clients send. Responses to these have a ``request-id``, which clients show with errors; all
responses have OpenAI's ``x-request-id``. Both are what the client sent as ``X-Request-Id``, if that
can be an id, so that it finds its request in the log.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2cli.server.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    http_failure,
    internal_error,
)

OVERLOADED = 529
"""Anthropic's status for a server that has too much to do."""

_REQUEST_ID = "k2.request_id"
_ERROR_CODE = "k2.error_code"
_ID_OF_CLIENT = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_MESSAGES = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}


def is_for_anthropic(scope: Scope) -> bool:
    """Return True if a request is one of Anthropic's API."""
    path: str = scope["path"]
    if path == _MESSAGES or path.startswith(f"{_MESSAGES}/"):
        return True
    return "anthropic-version" in Headers(scope=scope)


def request_id_of(scope: Scope) -> str:
    """Return the id of a request: the client's ``X-Request-Id``, else one that is made once."""
    found: str | None = scope.get(_REQUEST_ID)
    if found is None:
        sent = Headers(scope=scope).get("x-request-id", "")
        found = sent if _ID_OF_CLIENT.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
        scope[_REQUEST_ID] = found
    return found


def error_code_of(scope: Scope) -> str:
    """Return the code of the error with which a request was answered, or an empty text."""
    code: str = scope.get(_ERROR_CODE, "")
    return code


def anthropic_status(error: ApiError) -> int:
    """Return the status of an error in Anthropic's API."""
    return OVERLOADED if error.status == 503 and error.code == "over_capacity" else error.status


def anthropic_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return the object of an error in Anthropic's form."""
    status = anthropic_status(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = error.message
    if error.code == "context_length_exceeded":
        # By these words Claude Code knows that it has to shorten the conversation.
        message = f"prompt is too long: {message}"
    members: dict[str, Any] = {"type": kind, "message": message}
    if error.code == "unsupported_parameter" and error.param == "thread":
        # By these details the tool runner of Anthropic's SDK goes on without a thread.
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        members["details"] = details
    return {"type": "error", "error": members, "request_id": request_id}


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    """Return the response for an error."""
    scope[_ERROR_CODE] = error.code or ""
    if not is_for_anthropic(scope):
        return error.response()
    request_id = request_id_of(scope)
    headers = {**(error.headers or {}), "request-id": request_id}
    return JSONResponse(anthropic_error(error, request_id), anthropic_status(error), headers)


class RequestIds:
    """ASGI middleware that adds ``request-id`` to responses of Anthropic's API."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or not is_for_anthropic(scope):
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def install_error_handlers(app: Starlette) -> None:
    """Make the application answer all failures in the form of the request's API."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error, request.scope)

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(http_failure(error, request), request.scope)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the error again after this response, so uvicorn logs the traceback.
        return error_response(internal_error(error), request.scope)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_bug)
