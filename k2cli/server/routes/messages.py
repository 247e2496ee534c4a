"""The routes of Anthropic's Messages API: answers to conversations, and the tokens of a prompt."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from k2cli.server.context import context_of
from k2cli.server.dialects.anthropic_writer import MessagesWriter
from k2cli.server.dialects.error_responses import request_id_of
from k2cli.server.respond import respond


async def create_message(request: Request) -> Response:
    """Answer a conversation."""
    make_writer = partial(MessagesWriter, request_id=request_id_of(request.scope))
    return await respond(request, "messages", make_writer)


async def count_tokens(request: Request) -> JSONResponse:
    """Return the number of tokens of a prompt, also while no run is ready."""
    reader = context_of(request).reader
    tokens = (await reader.read("count_tokens", await request.body())).tokens
    return JSONResponse({"input_tokens": len(tokens)})
