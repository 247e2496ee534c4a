"""The route ``GET /v1/models``: the one model that this run serves, no others on the disk.

Clients of Anthropic's API get its members beside OpenAI's.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from k2cli.server.context import context_of
from k2cli.server.dialects.error_responses import is_for_anthropic
from k2cli.server.engine_request import check_model
from k2cli.server.served_model import ServedModel


def _description(served: ServedModel, request: Request) -> dict[str, Any]:
    members: dict[str, Any] = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "k2",
        "context_length": served.context_length,
    }
    if is_for_anthropic(request.scope):
        members |= {
            "type": "model",
            "display_name": served.name,
            "created_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
            "lifecycle": "active",
            "max_input_tokens": served.context_length,
            "max_tokens": served.context_length,
        }
    return members


async def list_models(request: Request) -> JSONResponse:
    """Return the served model, as a list of one."""
    served = context_of(request).served
    listed: dict[str, Any] = {"object": "list", "data": [_description(served, request)]}
    if is_for_anthropic(request.scope):
        listed |= {"has_more": False, "first_id": served.name, "last_id": served.name}
    return JSONResponse(listed)


async def get_model(request: Request) -> JSONResponse:
    """Return the served model by its name."""
    served = context_of(request).served
    check_model(request.path_params["name"], served)
    return JSONResponse(_description(served, request))
