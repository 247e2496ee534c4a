"""Errors of the HTTP API, and their form in OpenAI's.

Clients can show ``{"error": {"message", "type", "param", "code"}}``, so every failure has this
form: a missing route, a field of the wrong type, a wrong key, an engine that has ended. Responses
are made in ``dialects.error_responses``, which has Anthropic's form, too.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match

from k2cli.protocol import RequestFailed

# The client has closed the connection and does not receive it. nginx logs such requests with it.
CLIENT_CLOSED_REQUEST = 499
MAX_MESSAGE_LETTERS = 1000
_MAX_SEARCHED_LETTERS = 4 * MAX_MESSAGE_LETTERS
# The folders of an absolute path. Their names may have spaces within, but none at the ends; what
# follows a letter or a colon is a fraction or a URL.
_FOLDERS = re.compile(r"""(?<![\w.:/-])~?/(?:[^\s/'":;,](?:[^/\n'":;,]*[^\s/'":;,])?/)+""")
# What clients put before the path of a route: ``/v1/v1/messages``, ``/api/v1/models``.
_WRONG_BEGINNING = re.compile(r"^/(?:v1|api|openai|anthropic)(?=/)")
_logger = logging.getLogger(__name__)
_INVALID = "invalid_request_error"
_SERVER = "server_error"
_HTTP_CODES = {
    404: ("unknown_url", "there is no such route"),
    405: ("method_not_allowed", "this route does not accept that method"),
}
# Fields of both APIs that would change the answer, and that k2 does not support.
_NOT_OFFERED = {
    "audio": "answers are text",
    "compaction": "this server does not summarize conversations",
    "container": "this server runs no code",
    "function_call": "it was replaced by 'tool_choice'",
    "functions": "it was replaced by 'tools'",
    "moderation": "this server does not moderate texts",
    "output_config.task_budget": "this server keeps no budgets",
    "thread": "this server stores no conversations",
    "web_search_options": "this server does not search the web",
}


# Plain words for the validator's own, such as "Field required".
_REASONS = {
    "bool_type": "must be a boolean: true or false",
    "dict_type": "must be an object",
    "float_type": "must be a number",
    "int_from_float": "must be an integer",
    "int_type": "must be an integer",
    "list_type": "must be an array",
    "missing": "is required",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_short": "must not be empty",
}


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_LETTERS else f"{text[:MAX_MESSAGE_LETTERS]} ..."


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
        # What a client sent is quoted in messages, and may be megabytes.
        message, param = _shortened(message), param and _shortened(param)
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return the JSON object for the client."""
        members = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": members}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str, code: str | None = None) -> ApiError:
    """Make a 400 error that names the field."""
    return ApiError(400, message, param=param, code=code)


def type_named(kind: object) -> str:
    """Return the part of a message about a part of a request that has a ``type``, or should."""
    return f"is of type {kind!r}" if isinstance(kind, str) else "has no type"


def without_folders(text: str) -> str:
    """Shorten the paths in a text of the server to the names of their files.

    Clients see which file is wrong; the names of folders and users stay in the log, which has the
    whole text.
    """
    return _FOLDERS.sub("", text[:_MAX_SEARCHED_LETTERS])


def unavailable(cause: str) -> ApiError:
    """Make a 503 error: no run is ready, or the run ended before the request."""
    return ApiError(503, without_folders(cause), kind=_SERVER, code="engine_unavailable")


def engine_failure(failure: RequestFailed) -> ApiError:
    """Make the error for a request that the engine refused or broke off."""
    text = without_folders(failure.error)
    if text != failure.error:
        _logger.warning("%s", failure.error)
    match failure.kind:
        case "invalid":
            return ApiError(400, text)
        case "capacity":
            return ApiError(429, text, kind="rate_limit_error", code="over_capacity")
        case _:
            return ApiError(500, text, kind=_SERVER, code="internal_error")


def validation_failure(error: ValidationError) -> ApiError:
    """Make the error for the first wrong field of a request body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _field_path(first["loc"])
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ")
        if reason.startswith("recursion limit"):
            place = reason.partition(" at ")[2]
            return ApiError(400, f"the body nests too deeply at {place}", code="invalid_json")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    if first["type"] == "extra_forbidden" and param in _NOT_OFFERED:
        message = f"'{param}' is not supported: {_NOT_OFFERED[param]}"
        return invalid(message, param, "unsupported_parameter")
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field '{param}'", param, "unknown_parameter")
    reason = _REASONS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be", "must be", 1)
    if not param:
        return ApiError(400, f"the body is not a valid request: {reason}")
    return invalid(f"{param}: {reason}", param)


def _field_path(location: tuple[int | str, ...]) -> str:
    """Format ``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def http_failure(error: HTTPException, request: Request) -> ApiError:
    """Make the error for a request that no route takes."""
    code, reason = _HTTP_CODES.get(error.status_code, (None, str(error.detail)))
    message = f"{reason}: {request.method} {request.url.path}"
    if error.status_code == 404 and (meant := _route_meant(request)) is not None:
        message += f"; did you mean {meant}"
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, code=code, headers=headers)


def _route_meant(request: Request) -> str | None:
    """Return the route that a request with a wrong base URL meant, and what the URL must be."""
    path: str = request.scope["path"]
    rest = path.rstrip("/")
    while (shorter := _WRONG_BEGINNING.sub("", rest)) != rest:
        rest = shorter
    meant = f"/v1{rest}"
    if meant == path or not rest:
        return None
    scope = dict(request.scope) | {"path": meant}
    if not any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
        return None
    if "/v1" not in path:
        return f"{meant}? Most clients want a base URL that ends with /v1"
    return f"{meant}? Anthropic's clients want a base URL without /v1, OpenAI's one with it"


def internal_error(error: Exception) -> ApiError:
    """Make the 500 error for a fault of the server itself."""
    message = f"internal error: {type(error).__name__}"
    return ApiError(500, message, kind=_SERVER, code="internal_error")
