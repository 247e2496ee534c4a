"""Messages between a chat and the process that runs its MCP servers."""

from __future__ import annotations

from typing import Any

import msgspec

from k2cli.tools.settings import ServerSettings
from k2cli.units import KIB

MOST_RESULT_BYTES = 64 * KIB
"""Of a result's text that goes into a conversation; the rest is cut off, and a line says so."""


class ToolInfo(msgspec.Struct, frozen=True):
    """One tool as its server describes it; ``schema`` is that of its arguments."""

    name: str
    description: str
    schema: dict[str, Any]


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Start or reach a server, and list its tools."""

    number: int
    server: ServerSettings


class Disconnect(msgspec.Struct, frozen=True, tag=True):
    """End a server."""

    server: str


class Call(msgspec.Struct, frozen=True, tag=True):
    """Call a tool; ``arguments`` is the JSON text of an object."""

    number: int
    server: str
    tool: str
    arguments: str


class CancelCall(msgspec.Struct, frozen=True, tag=True):
    """Stop a call."""

    number: int


class Connected(msgspec.Struct, frozen=True, tag=True):
    """The tools of a server that is ready; ``left_out`` says which cannot be used and why."""

    number: int
    tools: list[ToolInfo]
    left_out: list[str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A server or a call failed."""

    number: int
    reason: str


class CallDone(msgspec.Struct, frozen=True, tag=True):
    """The text of a result, cut to ``MOST_RESULT_BYTES``; ``whole_bytes`` is its size before."""

    number: int
    text: str
    is_error: bool
    whole_bytes: int


class ServerEnded(msgspec.Struct, frozen=True, tag=True):
    """A server ended by itself."""

    server: str
    reason: str


ToHost = Connect | Disconnect | Call | CancelCall
FromHost = Connected | Failed | CallDone | ServerEnded
