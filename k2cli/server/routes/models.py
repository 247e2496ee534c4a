"""The route ``GET /v1/models``: the one model that this run serves, no others on the disk."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of
from k2cli.server.engine_request import check_model
from k2cli.server.served_model import ServedModel


def _description(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "k2",
        "context_length": served.context_length,
    }


async def list_models(request: Request) -> JSONResponse:
    """Return the served model, as a list of one."""
    return JSONResponse({"object": "list", "data": [_description(context_of(request).served)]})


async def get_model(request: Request) -> JSONResponse:
    """Return the served model by its name."""
    served = context_of(request).served
    check_model(request.path_params["name"], served)
    return JSONResponse(_description(served))
