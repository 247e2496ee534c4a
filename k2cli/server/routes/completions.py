"""The route ``POST /v1/completions``: continue a text or token ids, without a chat template."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.context import read_body
from k2cli.server.engine_request import completion_request
from k2cli.server.respond import respond
from k2cli.server.schemas import CompletionBody
from k2cli.server.shapes import CompletionShape


async def create_completion(request: Request) -> Response:
    """Continue a prompt."""
    body = await read_body(request, CompletionBody)
    return await respond(request, body, completion_request, CompletionShape)
