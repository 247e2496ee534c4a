"""``POST /v1/chat/completions``.

Tools are shown to the model through its chat template; what it writes comes back as text. Parsing
tool calls and reasoning out of that text is not there yet.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.context import read_body, respond
from k2cli.server.engine_request import prepare_chat
from k2cli.server.schemas import ChatCompletionBody
from k2cli.server.shapes import ChatShape


async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ChatCompletionBody)
    return await respond(request, body, prepare_chat, ChatShape)
