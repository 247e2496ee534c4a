"""``POST /v1/chat/completions``.

Tools are shown to the model through its chat template; what it writes comes back as text. Parsing
tool calls and reasoning out of that text is not there yet.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.respond import respond
from k2cli.server.shapes import ChatShape


async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, "chat", ChatShape)
