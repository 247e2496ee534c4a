"""The route ``POST /v1/completions``: continue a text or token ids, without a chat template."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.dialects.openai_completion_writer import CompletionWriter
from k2cli.server.respond import respond


async def create_completion(request: Request) -> Response:
    """Continue a prompt."""
    return await respond(request, "completion", CompletionWriter)
