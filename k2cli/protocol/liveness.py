"""Messages between the leader's guard and a follower's guard."""

from __future__ import annotations

from k2cli.protocol.message import Heartbeat, Message
from k2cli.protocol.progress_page import Phase
from k2cli.protocol.supervisor import (
    GuardStarted,
    LoadProgress,
    LogLine,
    RankFailed,
    RankReady,
    StopRun,
)


class ControlEndpoint(Message, tag=True, frozen=True):
    """The address at which the leader rank accepts its followers' control connections."""

    host: str
    port: int


class RankStatus(Message, tag=True, frozen=True):
    """Progress and memory of a rank, as its guard sees them from outside, once a second.

    ``resident_bytes`` is the memory of the process. ``mlx_bytes`` is what the arrays in MLX held at
    the last step, ``mlx_cached_bytes`` what MLX kept of freed arrays, and ``mlx_peak_bytes`` the
    most that arrays have held; 0 before MLX was loaded. ``works``: since the last status it has
    completed steps, or it was compiling or reading.
    """

    rank: int
    steps: int
    phase: Phase
    resident_bytes: int = 0
    mlx_bytes: int = 0
    works: bool = False
    mlx_cached_bytes: int = 0
    mlx_peak_bytes: int = 0


class RunActivity(Message, tag=True, frozen=True):
    """The ranks that work, for the guards of those that may be waiting for them."""

    working: list[int]


LivenessMessage = (
    Heartbeat
    | RunActivity
    | StopRun
    | ControlEndpoint
    | RankStatus
    | GuardStarted
    | LoadProgress
    | RankReady
    | LogLine
    | RankFailed
)
