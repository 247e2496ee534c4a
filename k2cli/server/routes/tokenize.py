"""The route ``POST /v1/tokenize``: the tokens of a prompt, with the chat template applied.

It also answers while no run is ready, because it needs only the tokenizer.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of, read_body
from k2cli.server.engine_request import tokenize_body
from k2cli.server.schemas import TokenizeBody


async def tokenize(request: Request) -> JSONResponse:
    """Return token ids and their count."""
    body = await read_body(request, TokenizeBody)
    context = context_of(request)
    tokens = await asyncio.to_thread(tokenize_body, body, context.tokenizer, context.served)
    return JSONResponse(
        {
            "model": context.served.name,
            "count": len(tokens),
            "tokens": tokens,
            "context_length": context.served.context_length,
        }
    )
