"""A guard <-> its rank: the rank's start and end; between them, requests."""

from __future__ import annotations

from typing import Literal

from k2cli.protocol.bootstrap import Assignment, Deadlines
from k2cli.protocol.liveness import ControlEndpoint
from k2cli.protocol.message import Heartbeat, Message
from k2cli.protocol.requests import (
    Cancel,
    Finished,
    Generate,
    PromptProgress,
    RequestFailed,
    Tokens,
)
from k2cli.protocol.supervisor import LoadProgress, RankReady


class Start(Message, tag=True, frozen=True):
    """First message to a rank. ``secret`` (hex) is for the control connections."""

    assignment: Assignment
    secret: str
    deadlines: Deadlines
    control_host: str


class Shutdown(Message, tag=True, frozen=True):
    """End in good order, at once."""


GuardMessage = Start | ControlEndpoint | Generate | Cancel | Shutdown | Heartbeat


class ControlListening(Message, tag=True, frozen=True):
    """The leader rank has bound its control port."""

    port: int


class Fatal(Message, tag=True, frozen=True):
    """The rank is about to exit because of this."""

    error: str
    traceback: str = ""
    kind: Literal["memory", "lost peer", "internal"] = "internal"


class EngineReady(Message, tag=True, frozen=True):
    """Leader rank only: every rank has proven its part; requests are welcome."""


RankMessage = (
    LoadProgress
    | RankReady
    | ControlListening
    | EngineReady
    | PromptProgress
    | Tokens
    | Finished
    | RequestFailed
    | Fatal
)
