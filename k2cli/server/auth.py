"""Checks of the API key and the size of the body, made before the body is read.

Both checks are one ASGI layer around the application, so that they apply to every route.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2cli.server.dialects.error_responses import error_response
from k2cli.server.errors import ApiError
from k2cli.server.served_model import ServedModel

# Probes (systemd, load balancers) have no key and use any name, and the answer reveals only the
# state.
OPEN_PATHS = frozenset({"/health"})

# Claude Code asks for "/" first, without a key, and the answer only says that k2 is here. The
# document is the same for all runs of a version.
KEYLESS_PATHS = OPEN_PATHS | {"/", "/openapi.json"}


_HOW_TO_SEND = "send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"


def key_refusal(headers: Headers, api_key: str) -> str | None:
    """Compare the key with ``Authorization: Bearer`` and Anthropic's ``x-api-key``.

    One of them suffices: Claude Code may send a key of its user's account beside the right one. The
    comparison takes the same time for all wrong keys.

    Returns:
        What is wrong, or None for the right key. An empty key is none.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    sent = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    given = [key.strip() for key in sent if key.strip()]
    right = api_key.encode()
    matches = [hmac.compare_digest(key.encode("latin-1"), right) for key in given]
    if any(matches):
        return None
    if given:
        return "wrong API key: the run was started with another one"
    return f"the run asks for an API key, and the request has none: {_HOW_TO_SEND}"


def too_large(limit_bytes: int) -> ApiError:
    """Make the error for a body over the limit."""
    return ApiError(
        413, f"the request body is over the limit of {limit_bytes} bytes", code="body_too_large"
    )


BODIES_HELD = 8
"""Bodies of the largest size whose bytes may be in memory at the same time."""


@dataclass(slots=True)
class _Body:
    receive: Receive
    received_bytes: int = 0


class AccessControl:
    """ASGI middleware: 401 without the correct key, 413 over the body limit.

    A body stays in memory until its request ends, so the bytes of all of them together are limited
    too: 503 beyond that.
    """

    def __init__(self, app: ASGIApp, served: ServedModel) -> None:
        self._app = app
        self._served = served
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await error_response(refusal, scope)(scope, receive, send)
        else:
            body = _Body(receive)
            try:
                await self._app(scope, lambda: self._receive(body), send)
            finally:
                self._held_bytes -= body.received_bytes

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        key = self._served.api_key
        guarded = key is not None and scope["path"] not in KEYLESS_PATHS
        if guarded and (problem := key_refusal(headers, key or "")) is not None:
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, problem, code="invalid_api_key", headers=challenge)
        if "content-length" in headers and "transfer-encoding" in headers:
            message = "Content-Length and Transfer-Encoding contradict each other"
            return ApiError(400, message, code="bad_framing", headers={"Connection": "close"})
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._served.max_body_bytes:
            return too_large(self._served.max_body_bytes)
        return None

    async def _receive(self, body: _Body) -> Message:
        """Receive a message and count its bytes, also of bodies without a ``Content-Length``.

        Raises:
            ApiError: 413 or 503, beyond the limit of one body or of all.
        """
        message = await body.receive()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            body.received_bytes += size
            self._held_bytes += size
            if body.received_bytes > self._served.max_body_bytes:
                raise too_large(self._served.max_body_bytes)
            if self._held_bytes > BODIES_HELD * self._served.max_body_bytes:
                raise ApiError(
                    503,
                    "too many large requests are being received; try again",
                    kind="server_error",
                    code="over_capacity",
                    headers={"Retry-After": "10"},
                )
        return message
