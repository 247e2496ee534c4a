"""The route ``POST /v1/embeddings``, which says that there are none.

Some clients try it when they are set up. A model that generates text has no useful embeddings.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of
from k2cli.server.errors import ApiError


async def refuse_embeddings(request: Request) -> JSONResponse:
    """Refuse every request, and say what to do instead.

    Raises:
        ApiError: 400, always.
    """
    name = context_of(request).served.name
    message = (
        f"k2 makes no embeddings: '{name}' is a model that generates text; serve an embedding "
        "model with another server, and give the client that server's address for embeddings"
    )
    raise ApiError(400, message, code="unsupported_route")
