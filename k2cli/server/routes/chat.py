"""The route ``POST /v1/chat/completions``: the next turn of a conversation."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.dialects.openai_chat_writer import ChatWriter
from k2cli.server.respond import respond


async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, "chat", ChatWriter)
