"""Launcher <-> leader's guard: orders down, the events of a run up.

Followers' events are passed on by the leader's guard.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from k2cli.protocol.bootstrap import Bootstrap
from k2cli.protocol.message import Heartbeat, Message


class StopRun(Message, tag=True, frozen=True):
    """End the run. ``cause`` is shown to clients whose request it breaks off.

    ``failed`` True: something is broken, so ranks are ended without the polite part; a guard of a
    run that ``restarts`` then stays for the next attempt.
    """

    cause: str
    failed: bool = False


class NextAttempt(Message, tag=True, frozen=True):
    """Begin again after a failure, with what the bootstrap says; the API's port stays."""

    bootstrap: Bootstrap


LauncherMessage = Heartbeat | StopRun | NextAttempt


class GuardStarted(Message, tag=True, frozen=True):
    """A guard is connected and has started its rank."""

    rank: int
    node: str
    guard_pid: int
    rank_pid: int


class LoadProgress(Message, tag=True, frozen=True):
    """Bytes of its own weights that a rank has loaded so far."""

    rank: int
    phase: Literal["initialising", "loading", "checking", "warming up"]
    done_bytes: int = 0
    total_bytes: int = 0


class RankReady(Message, tag=True, frozen=True):
    """A rank has loaded, and proven, its part. All in bytes, measured by the rank.

    ``bytes_read`` is what it asked of the checkpoint's files, beside their headers.
    """

    rank: int
    weights_bytes: int
    active_memory_bytes: int
    peak_memory_bytes: int
    load_seconds: float
    bytes_read: int = 0


class RunReady(Message, tag=True, frozen=True):
    """Coverage check and self-test passed on all ranks, and the API answers."""

    url: str


class LogLine(Message, tag=True, frozen=True):
    """One line that a rank or its guard wrote."""

    rank: int
    node: str
    source: Literal["rank", "guard"]
    text: str


class RankFailed(Message, tag=True, frozen=True):
    """A rank is gone or was ended. ``exit_status`` is negative for a signal, as in subprocess.

    ``cause`` is one sentence for the user. The first such event of a run is the root cause.
    """

    rank: int
    node: str
    cause: str
    exit_status: int | None = None
    last_lines: list[str] = msgspec.field(default_factory=list)


class RunEnded(Message, tag=True, frozen=True):
    """The last event: all ranks are gone. ``failed`` False after a StopRun."""

    cause: str
    failed: bool


class RunRestarting(Message, tag=True, frozen=True):
    """Written by the supervisor: attempt ``attempt`` begins in ``delay_seconds``."""

    cause: str
    attempt: int
    delay_seconds: float


RunEvent = (
    Heartbeat
    | GuardStarted
    | LoadProgress
    | RankReady
    | RunReady
    | LogLine
    | RankFailed
    | RunEnded
    | RunRestarting
)
