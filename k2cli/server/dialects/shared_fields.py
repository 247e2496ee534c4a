"""Fields and limits of requests that several dialects have in the same form."""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from k2cli.server.dialects.body import Body

MAX_STOP_LETTERS = 1024
"""Every step of an answer compares its end with the whole of each stop string."""
MAX_MESSAGES = 16_384
MAX_PARTS = 16_384
MAX_TOOLS = 1024
_logger = logging.getLogger(__name__)

# fail_fast: the second wrong member of a million says nothing more than the first.
Objects = Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def check_tool_choice(value: Any) -> Any:
    """Return a ``tool_choice`` that leaves the decision to the model; refuse others by name."""
    if value in ("auto", "none"):
        return value
    kind = value.get("type") if isinstance(value, dict) else value
    if not isinstance(kind, str):
        raise ValueError("must be 'auto', 'none' or an object with a 'type'")
    raise ValueError(
        f"{kind!r} is not supported yet: a call that the model must make needs structured "
        "output, which is planned; 'auto' and 'none' are supported"
    )


class Thinking(Body):
    """Switch of the model's reasoning. Its budget and its display are ignored.

    Anthropic's, and that of Moonshot's and Z.ai's own servers in Chat.
    """

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Any = None
    display: Any = None


class ResponseFormat(BaseModel):
    """Format of the answer. Only text is supported; schemas are refused rather than ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: str

    @field_validator("type")
    @classmethod
    def _text_only(cls, value: str) -> str:
        if value != "text":
            raise ValueError(f"'{value}' is not supported yet; only 'text' is")
        return value


@functools.lru_cache(maxsize=256)
def log_left_out(kinds: tuple[str, ...]) -> None:
    """Log that tools of a server or of other models are not offered, once for the same ones."""
    names = ", ".join(map(repr, kinds))
    _logger.warning("tools that this server does not have were left out of requests: %s", names)
