"""The route ``GET /health``, without a key: 200 only while the run takes requests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of
from k2cli.server.errors import without_folders


async def health(request: Request) -> JSONResponse:
    """Return the state of the run, and the cause if it is not ready."""
    context = context_of(request)
    state = context.engine.state
    if state == "ready":
        return JSONResponse({"state": state, "model": context.served.name})
    cause = without_folders(context.engine.cause or f"the run is {state}")
    return JSONResponse({"state": state, "cause": cause, "model": context.served.name}, 503)
