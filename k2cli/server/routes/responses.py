"""The route ``POST /v1/responses``. Nothing is stored: each request has the whole conversation."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.dialects.responses_writer import ResponsesWriter
from k2cli.server.respond import respond


async def create_response(request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, "responses", ResponsesWriter)
