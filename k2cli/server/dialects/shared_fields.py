"""Fields and limits of requests that several dialects have in the same form."""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Any, Literal

from pydantic import Field

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


class Thinking(Body):
    """Switch of the model's reasoning. Its budget and its display are ignored.

    Anthropic's, and that of Moonshot's and Z.ai's own servers in Chat.
    """

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Any = None
    display: Any = None


@functools.lru_cache(maxsize=256)
def log_left_out(kinds: tuple[str, ...]) -> None:
    """Log that tools of a server or of other models are not offered, once for the same ones."""
    names = ", ".join(map(repr, kinds))
    _logger.warning("tools that this server does not have were left out of requests: %s", names)
