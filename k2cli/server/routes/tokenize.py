"""``POST /v1/tokenize``: how many tokens a prompt is, and which, with the chat template applied.

Works while no run is ready too: it needs the tokenizer only.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from k2cli.server.context import context_of, read_body
from k2cli.server.prepare import prepare_tokenize
from k2cli.server.schemas import TokenizeBody

router = APIRouter()


@router.post("/v1/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """Token ids and their count."""
    body = await read_body(request, TokenizeBody)
    context = context_of(request)
    tokens = await asyncio.to_thread(prepare_tokenize, body, context.tokenizer, context.served)
    return {
        "model": context.served.name,
        "count": len(tokens),
        "tokens": tokens,
        "context_length": context.served.context_length,
    }
