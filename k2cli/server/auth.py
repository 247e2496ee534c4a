"""Checks of the API key and the size of the body, made before the body is read.

Both checks are one ASGI layer around the application, so that they apply to every route.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2cli.server.errors import ApiError
from k2cli.server.served_model import ServedModel

# Probes (systemd, load balancers) have no key, and the answer reveals only the state.
_OPEN_PATHS = frozenset({"/health"})


def is_right_key(authorization: str, api_key: str) -> bool:
    """Compare an ``Authorization`` header with the key, in constant time."""
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(
        given.strip().encode("latin-1"), api_key.encode()
    )


def too_large(limit_bytes: int) -> ApiError:
    """Make the error for a body over the limit."""
    return ApiError(
        413, f"the request body is over the limit of {limit_bytes} bytes", code="body_too_large"
    )


class AccessControl:
    """ASGI middleware: 401 without the correct key, 413 over the body limit."""

    def __init__(self, app: ASGIApp, served: ServedModel) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        key = self._served.api_key
        authorization = headers.get("authorization", "")
        if (
            key is not None
            and scope["path"] not in _OPEN_PATHS
            and not is_right_key(authorization, key)
        ):
            message = "wrong API key" if authorization else "an API key is needed"
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, message, code="invalid_api_key", headers=challenge)
        if "content-length" in headers and "transfer-encoding" in headers:
            message = "Content-Length and Transfer-Encoding contradict each other"
            return ApiError(400, message, code="bad_framing", headers={"Connection": "close"})
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._served.max_body_bytes:
            return too_large(self._served.max_body_bytes)
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Count received bytes, for bodies without a ``Content-Length``."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._served.max_body_bytes:
                    raise too_large(self._served.max_body_bytes)
            return message

        return counted
