"""``POST /v1/tokenize``: how many tokens a prompt is, and which, with the chat template applied.

Works while no run is ready too: it needs the tokenizer only.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of


async def tokenize(request: Request) -> JSONResponse:
    """Token ids and their count."""
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
