"""Messages between a guard and its rank: start, end, and the requests between them."""

from __future__ import annotations

from typing import Literal

from k2cli.protocol.bootstrap import Assignment, Deadlines
from k2cli.protocol.liveness import ControlEndpoint
from k2cli.protocol.message import Heartbeat, Message
from k2cli.protocol.requests import (
    Cancel,
    Finished,
    Generate,
    Paused,
    PromptProgress,
    RequestFailed,
    Tokens,
    WaitingOrder,
)
from k2cli.protocol.supervisor import LoadProgress, RankReady


class Start(Message, tag=True, frozen=True):
    """First message to a rank. ``secret`` (hex) is for the control connections."""

    assignment: Assignment
    secret: str
    deadlines: Deadlines
    control_host: str


class Shutdown(Message, tag=True, frozen=True):
    """Order to end at once."""


GuardMessage = Start | ControlEndpoint | Generate | Cancel | Shutdown | Heartbeat


class ControlListening(Message, tag=True, frozen=True):
    """The port at which the leader rank accepts control connections."""

    port: int


class Fatal(Message, tag=True, frozen=True):
    """The error because of which the rank is about to exit."""

    error: str
    traceback: str = ""
    kind: Literal["memory", "lost peer", "internal"] = "internal"


class EngineReady(Message, tag=True, frozen=True):
    """Sent by the leader rank once every rank has passed its checks and requests may come.

    ``checked_tokens`` is the length of the longest prompt of the link check, 0 without one;
    ``remark`` tells whoever launched why something is not as it was asked for.
    """

    checked_tokens: int = 0
    remark: str = ""


class KvCacheUse(Message, tag=True, frozen=True):
    """Use of the plan's KV cache in tokens, from the leader rank whenever it changes.

    ``reserved_tokens`` is the most that the running requests may need. ``prefix_tokens`` is taken
    by ``prefixes`` kept ones, which give way to requests. Both share ``budget_tokens``.
    """

    prefixes: int
    prefix_tokens: int
    reserved_tokens: int
    budget_tokens: int


RankMessage = (
    LoadProgress
    | RankReady
    | ControlListening
    | EngineReady
    | PromptProgress
    | Paused
    | Tokens
    | Finished
    | RequestFailed
    | KvCacheUse
    | WaitingOrder
    | Fatal
)
