"""Protection of a server without an API key from web pages in its user's own browser.

A page may send requests to any address that the browser reaches. What keeps it from using the
model and reading answers is, on a server without a key:

* the ``Host`` header must name this server, or a page whose name was rebound to this address
  (DNS rebinding) could read everything;
* an ``Origin`` other than this server, or ``Sec-Fetch-Site: cross-site``, is refused. Only to open
  k2's own page by a link is allowed from everywhere: the page that has the link cannot read it;
* a body must be declared as JSON, which a page cannot do for a foreign server without asking first
  (CORS preflight), and a preflight is only answered for origins that were allowed.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from k2cli.server.auth import OPEN_PATHS
from k2cli.server.dialects.error_responses import error_response
from k2cli.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class OriginRules:
    """Names by which the server is known, and origins of pages that may use it.

    Args:
        hosts: names beside loopback addresses and ``localhost``, without a port.
        origins: such as ``https://chat.example``; ``*`` allows all.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def knows_host(self, name: str) -> bool:
        """Return True if a ``Host`` header without its port names this server."""
        if name.lower() == "localhost" or name.lower() in self.hosts:
            return True
        bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
        try:
            return ipaddress.ip_address(bare).is_loopback
        except ValueError:
            return False

    def knows_origin(self, origin: str, host: str) -> bool:
        """Return True if a page of that origin may use the server."""
        if origin in self.origins or "*" in self.origins:
            return True
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:  # such as "http://["
            return False


def host_name(host: str) -> str:
    """Return a ``Host`` header without its port; IPv6 keeps its brackets."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not name.endswith(":") else host


def _is_link(scope: Scope) -> bool:
    """Return True for a request by which a browser opens the page of this server in a tab."""
    headers = Headers(scope=scope)
    target = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope["path"] == "/" and scope["method"] == "GET" and target == ("navigate", "document")


class OriginCheck:
    """ASGI middleware that refuses requests of foreign web pages."""

    def __init__(self, app: ASGIApp, rules: OriginRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is not None:
            await error_response(refusal, scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in OPEN_PATHS:
            return None
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._rules.knows_host(host_name(host)):
            return ApiError(
                403,
                f"this server is not known as '{host[:100]}'; start it with --allow-host NAME",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        foreign = origin is not None and not self._rules.knows_origin(origin, host)
        from_elsewhere = headers.get("sec-fetch-site") == "cross-site" and not _is_link(scope)
        if foreign or (origin is None and from_elsewhere):
            return ApiError(
                403,
                "web pages of other origins may not use this server; allow one with --cors ORIGIN",
                code="origin_not_allowed",
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return ApiError(
                415,
                "the request needs the header 'Content-Type: application/json'",
                code="not_json",
            )
        return None
