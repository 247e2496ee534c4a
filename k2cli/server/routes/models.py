"""``GET /v1/models``: the one model that this run serves, never what else lies on the disk."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from k2cli.server.context import context_of
from k2cli.server.prepare import check_model
from k2cli.server.served import ServedModel

router = APIRouter()


def _described(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "k2",
        "context_length": served.context_length,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The served model, as a list of one."""
    return {"object": "list", "data": [_described(context_of(request).served)]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """The served model by its name."""
    served = context_of(request).served
    check_model(name, served)
    return _described(served)
