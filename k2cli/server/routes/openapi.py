"""The route ``GET /openapi.json``, without a key: the document says nothing about the run."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response


async def openapi(request: Request) -> Response:
    """Return the OpenAPI document, which the first request for it builds."""
    return Response(await asyncio.to_thread(_document), media_type="application/json")


def _document() -> bytes:
    # Imported late: a guard must listen soon, and few clients ask for the document.
    from k2cli.server.openapi.document import openapi_json

    return openapi_json()
