"""The routes that show a run: ``GET /metrics`` for Prometheus, ``GET /v1/status`` as JSON.

Both need the key where the run has one, and answer also while no run is ready.
"""

from __future__ import annotations

import asyncio
import importlib

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from k2cli.server.context import context_of
from k2cli.server.metrics.snapshot import snapshot_of
from k2cli.server.metrics.status import status_of

_EXPOSITION = "k2cli.server.metrics.exposition"


async def metrics(request: Request) -> Response:
    """Return all metrics, in OpenMetrics if the client asks for it."""
    # The import takes 50 ms, once, in which answers must go on.
    await asyncio.to_thread(importlib.import_module, _EXPOSITION)
    from k2cli.server.metrics.exposition import exposition

    snapshot = snapshot_of(context_of(request))
    text, content_type = exposition(snapshot, request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


async def status(request: Request) -> Response:
    """Return the state of the run, its ranks and its requests."""
    context = context_of(request)
    document = msgspec.json.encode(status_of(snapshot_of(context), context.served))
    headers = {"Cache-Control": "no-store"}
    return Response(document, media_type="application/json", headers=headers)
