"""Leader's guard <-> a follower's guard."""

from __future__ import annotations

from k2cli.protocol.launcher import (
    GuardStarted,
    LoadProgress,
    LogLine,
    RankFailed,
    RankReady,
    StopRun,
)
from k2cli.protocol.message import Heartbeat, Message


class ControlEndpoint(Message, tag=True, frozen=True):
    """Where the leader rank waits for its followers' control connections."""

    host: str
    port: int


class RankStatus(Message, tag=True, frozen=True):
    """A follower's watchdog view, once a second: steps done and what its rank is doing."""

    rank: int
    steps: int
    phase: str


LivenessMessage = (
    Heartbeat
    | StopRun
    | ControlEndpoint
    | RankStatus
    | GuardStarted
    | LoadProgress
    | RankReady
    | LogLine
    | RankFailed
)
