"""Messages between the supervisor and the leader's guard: orders, and the events of a run.

The leader's guard also sends the events of the followers' guards on.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from k2cli.protocol.access import NamedKeys
from k2cli.protocol.bootstrap import Bootstrap
from k2cli.protocol.message import Heartbeat, Message


class StopRun(Message, tag=True, frozen=True):
    """End the run. Clients whose request it breaks off get ``cause``.

    ``failed`` True means that ranks are ended without a grace period. The leader's guard of a run
    with ``restarts`` then stays for the next attempt.
    """

    cause: str
    failed: bool = False


class NextAttempt(Message, tag=True, frozen=True):
    """Start a new attempt after a failure, with this bootstrap. The API's port stays open."""

    bootstrap: Bootstrap


SupervisorMessage = Heartbeat | StopRun | NextAttempt | NamedKeys


class GuardStarted(Message, tag=True, frozen=True):
    """Process ids of a guard and its rank. ``rank_pid`` is 0 until the rank has started."""

    rank: int
    node: str
    guard_pid: int
    rank_pid: int


class LoadProgress(Message, tag=True, frozen=True):
    """Bytes of its own weights that a rank has loaded so far, or the shape that it warms up.

    ``shape`` describes the step that is computed, the ``number``-th of ``count``; the latter two
    are 0 while it is not known how many there will be.
    """

    rank: int
    phase: Literal["initialising", "loading", "checking", "warming up"]
    done_bytes: int = 0
    total_bytes: int = 0
    shape: str = ""
    number: int = 0
    count: int = 0


class RankReady(Message, tag=True, frozen=True):
    """A rank has loaded and checked its part. Sizes are measured by the rank.

    ``bytes_read`` counts what it read from the checkpoint's files, without their headers;
    ``load_seconds`` is the time for that, and for what was computed from it.
    """

    rank: int
    weights_bytes: int
    active_memory_bytes: int
    peak_memory_bytes: int
    load_seconds: float
    bytes_read: int = 0


class RunReady(Message, tag=True, frozen=True):
    """All ranks passed the coverage check and the self-test, and the API answers.

    ``checked_tokens`` and ``remark`` are those of ``EngineReady``.
    """

    url: str
    checked_tokens: int = 0
    remark: str = ""


class TlsCertificate(Message, tag=True, frozen=True):
    """The certificate chain (PEM) that the API shows from now on: at the start, or a renewed one.

    Commands of the machine that launched the run trust it, and nothing else, for this run.
    """

    pem: str


class LogLine(Message, tag=True, frozen=True):
    """A line of output of a rank or its guard, or of the API about one request (``access``)."""

    rank: int
    node: str
    source: Literal["rank", "guard", "access"]
    text: str


class RankFailed(Message, tag=True, frozen=True):
    """Failure of a rank or its guard. ``exit_status`` is negative for a signal, as in subprocess.

    ``cause`` is one sentence for the user. The first such event of a run is the root cause.
    """

    rank: int
    node: str
    cause: str
    exit_status: int | None = None
    last_lines: list[str] = msgspec.field(default_factory=list)


class RunEnded(Message, tag=True, frozen=True):
    """The last event: all ranks are gone. ``failed`` is False if the end was ordered."""

    cause: str
    failed: bool


class RunRestarting(Message, tag=True, frozen=True):
    """Attempt ``attempt`` starts in ``delay_seconds``. Only the supervisor writes this event."""

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
    | TlsCertificate
)
