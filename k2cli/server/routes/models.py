"""The route ``GET /v1/models``: the one model that this run serves, and its aliases.

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


def _description(served: ServedModel, name: str, request: Request) -> dict[str, Any]:
    form = served.output_format
    members: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "k2",
        "context_length": served.context_length,
        "tool_parser": form.tools.name if form.tools else "none",
        "reasoning_parser": form.reasoning.name if form.reasoning else "none",
    }
    if is_for_anthropic(request.scope):
        members |= {
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
            "lifecycle": "active",
            "max_input_tokens": served.context_length,
            "max_tokens": served.context_length,
        }
    return members


async def list_models(request: Request) -> JSONResponse:
    """Return the served model under each of its names, its own first."""
    served = context_of(request).served
    data = [_description(served, name, request) for name in served.names]
    listed: dict[str, Any] = {"object": "list", "data": data}
    if is_for_anthropic(request.scope):
        listed |= {"has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return JSONResponse(listed)


async def get_model(request: Request) -> JSONResponse:
    """Return the served model by one of its names."""
    served = context_of(request).served
    name = request.path_params["name"]
    check_model(name, served)
    return JSONResponse(_description(served, name, request))
