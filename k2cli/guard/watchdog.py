"""The guard's watchdog: detect from outside that a rank makes no progress.

The step counter is the heartbeat of a rank (invariant 6). A rank counts as dead if its counter does
not change for longer than its phase allows, or if a signal has stopped it. Pauses of the guard do
not count. The decision depends only on the counters and the clock that the caller passes in.
"""

from __future__ import annotations

from k2cli.pauses import PauseAwareClock
from k2cli.protocol import Deadlines
from k2cli.protocol.progress_page import Phase, Progress
from k2cli.units import format_duration

INTERVAL_SECONDS = 0.25
# After a pause of this length the rank gets its whole time again: it was likely stopped too, and
# its memory may have to be read back from the disk.
_LONG_PAUSE_SECONDS = 3.0


def phase_deadline(phase: Phase, deadlines: Deadlines) -> float:
    """Return the seconds that a rank may spend in ``phase`` without completing a step."""
    match phase:
        case "initialising":
            return deadlines.initialisation
        case "loading" | "checking":
            return deadlines.load_stall
        case "warming up":
            return deadlines.warmup_stall
        case "waiting":
            return deadlines.peer_stall
        case "idle" | "busy" | "ending":
            return deadlines.step_stall


class StallWatch:
    """The observed progress of one rank, which was started now.

    Args:
        deadlines: the longest time without a step, per phase.
        clock: read at each observation.
    """

    def __init__(self, deadlines: Deadlines, clock: PauseAwareClock) -> None:
        self._deadlines = deadlines
        self._clock = clock
        self._moved_at = clock.now()
        self._paused_seconds = clock.paused_seconds
        self._progress = Progress(0, "initialising")
        self._stopped_since: float | None = None

    def observe(self, progress: Progress, *, stopped: bool) -> str | None:
        """Record an observation. Return the reason to end the rank, or None if all is well."""
        now = self._clock.now()
        if self._clock.paused_seconds - self._paused_seconds > _LONG_PAUSE_SECONDS:
            self._moved_at = now
            self._stopped_since = now if stopped else None
        self._paused_seconds = self._clock.paused_seconds
        if progress != self._progress:
            self._progress, self._moved_at = progress, now
        if not stopped:
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        return self._verdict(now)

    def _verdict(self, now: float) -> str | None:
        if self._stopped_since is not None and now - self._stopped_since > self._deadlines.stopped:
            return f"it was stopped (SIGSTOP) for {format_duration(now - self._stopped_since)}"
        still = now - self._moved_at
        if still > phase_deadline(self._progress.phase, self._deadlines):
            return f"it made no progress for {format_duration(still)} while {self._progress.phase}"
        return None
