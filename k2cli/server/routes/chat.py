"""The route ``POST /v1/chat/completions``.

The chat template shows tools to the model, and its output is returned as text. Tool calls and
reasoning are not parsed out of that text yet.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.dialects.openai_chat import ChatWriter
from k2cli.server.respond import respond


async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, "chat", ChatWriter)
