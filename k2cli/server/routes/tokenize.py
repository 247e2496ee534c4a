"""The route ``POST /v1/tokenize``: the tokens of a prompt, with the chat template applied.

It also answers while no run is ready, because it needs only the tokenizer.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of


async def tokenize(request: Request) -> JSONResponse:
    """Return token ids and their count."""
    context = context_of(request)
    tokens = (await context.reader.read("tokenize", await request.body())).tokens
    return JSONResponse(
        {
            "model": context.served.name,
            "count": len(tokens),
            "tokens": tokens,
            "context_length": context.served.context_length,
        }
    )
