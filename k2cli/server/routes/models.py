"""The route ``GET /v1/models``: the one model that this run serves, and its aliases."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of
from k2cli.server.engine_request import check_model
from k2cli.server.served_model import ServedModel


def _description(served: ServedModel, name: str) -> dict[str, Any]:
    form = served.output_format
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "k2",
        "context_length": served.context_length,
        "tool_parser": form.tools.name if form.tools else "none",
        "reasoning_parser": form.reasoning.name if form.reasoning else "none",
    }


async def list_models(request: Request) -> JSONResponse:
    """Return the served model under each of its names, its own first."""
    served = context_of(request).served
    data = [_description(served, name) for name in served.names]
    return JSONResponse({"object": "list", "data": data})


async def get_model(request: Request) -> JSONResponse:
    """Return the served model by one of its names."""
    served = context_of(request).served
    name = request.path_params["name"]
    check_model(name, served)
    return JSONResponse(_description(served, name))
