"""Checks of the API key and the size of the body, made before the body is read.

Both checks are one ASGI layer around the application, so that they apply to every route.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2cli.access.key_ring import Client, KeyRing, Refused
from k2cli.server.admission import set_client
from k2cli.server.dialects.error_responses import error_response
from k2cli.server.errors import ApiError
from k2cli.server.metrics.request_record import record_of
from k2cli.server.page.files import PAGE_FOLDER
from k2cli.server.served_model import ServedModel

# Probes (systemd, load balancers) have no key and use any name, and the answer reveals only the
# state.
OPEN_PATHS = frozenset({"/health"})

# Claude Code asks for "/" first, without a key; a browser gets the page there, and its user enters
# the key in it. Page and OpenAPI document are the same for all runs of a version.
_KEYLESS_PATHS = OPEN_PATHS | {"/", "/openapi.json"}


# They show what others do, and when.
MONITORING_PATHS = frozenset({"/metrics", "/v1/status"})

_HOW_TO_SEND = "send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"


def _is_keyless(path: str) -> bool:
    return path in _KEYLESS_PATHS or path.startswith(PAGE_FOLDER)


def client_of_headers(headers: Headers, keys: KeyRing) -> Client:
    """Return the client whose key is in ``Authorization: Bearer`` or Anthropic's ``x-api-key``.

    One of them suffices: Claude Code may send a key of its user's account beside the right one. An
    empty key is none.

    Raises:
        Refused: if no key is right.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    sent = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    given = [key.strip() for key in sent if key.strip()]
    if not given:
        raise Refused(f"the run asks for an API key, and the request has none: {_HOW_TO_SEND}")
    return keys.identify([key.encode("latin-1") for key in given])


def too_large(limit_bytes: int) -> ApiError:
    """Make the error for a body over the limit."""
    return ApiError(
        413, f"the request body is over the limit of {limit_bytes} bytes", code="body_too_large"
    )


def _with_limits(send: Send, client: Client) -> Send:
    """Return a ``send`` that adds the headers of the client's limits, if it has any."""
    if not client.usage.headers():
        return send

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(client.usage.headers())
        await send(message)

    return send_with_limits


BODIES_HELD = 8
"""Bodies of the largest size whose bytes may be in memory at the same time."""


@dataclass(slots=True)
class _Body:
    receive: Receive
    received_bytes: int = 0


class AccessControl:
    """ASGI middleware: 401 without a right key, 413 over the body limit.

    Responses to a key with limits say in their headers what is left of these.

    A body stays in memory until its request ends, so the bytes of all of them together are limited
    too: 503 beyond that.
    """

    def __init__(self, app: ASGIApp, served: ServedModel, keys: KeyRing) -> None:
        self._app = app
        self._served = served
        self._keys = keys
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            client = self._admitted_client(scope)
        except ApiError as refusal:
            await error_response(refusal, scope)(scope, receive, send)
            return
        set_client(scope, client)
        body = _Body(receive)
        try:
            await self._app(scope, lambda: self._receive(body), _with_limits(send, client))
        finally:
            self._held_bytes -= body.received_bytes

    def _admitted_client(self, scope: Scope) -> Client:
        """Return the client of a request whose header is in order.

        Raises:
            ApiError: 401, 403, 400 or 413.
        """
        headers, client = Headers(scope=scope), self._keys.owner
        if self._keys.required and not _is_keyless(scope["path"]):
            try:
                client = client_of_headers(headers, self._keys)
            except Refused as refused:
                challenge = {"WWW-Authenticate": "Bearer"}
                raise ApiError(
                    401, str(refused), code="invalid_api_key", headers=challenge
                ) from None
            if scope["path"] in MONITORING_PATHS and not client.may_monitor:
                raise ApiError(
                    403,
                    "this key may not read the status of the run, which shows the use of all keys; "
                    "for one that may: k2 keys create NAME --monitor",
                    code="not_permitted",
                )
            record_of(scope).key = client.name
        if "content-length" in headers and "transfer-encoding" in headers:
            message = "Content-Length and Transfer-Encoding contradict each other"
            raise ApiError(400, message, code="bad_framing", headers={"Connection": "close"})
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._served.max_body_bytes:
            raise too_large(self._served.max_body_bytes)
        return client

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
