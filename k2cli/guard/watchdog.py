"""Judges from outside whether a rank still gets anywhere: the guard's watchdog.

Steps completed are the heartbeat of a rank (design, invariant 6). A process that exists but whose
step counter stands still for longer than its phase allows is as good as dead, and so is one that
was stopped by a signal. The judgement is pure: counters and a clock in, a verdict out.
"""

from __future__ import annotations

from k2cli.protocol import Deadlines
from k2cli.protocol.progress_page import Phase, Progress
from k2cli.units import format_duration

INTERVAL_SECONDS = 0.25
# The guard itself did not run for this long (stopped, or the machine slept): what it then sees of
# its rank is old, so all clocks start anew.
_GUARD_PAUSE_SECONDS = 3.0


def phase_deadline(phase: Phase, deadlines: Deadlines) -> float:
    """Seconds that a rank may spend in ``phase`` without completing a step."""
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
    """What is known of one rank's progress. Times are seconds of one monotonic clock.

    Args:
        deadlines: how long each phase may stand still.
        now: when the rank was started.
    """

    def __init__(self, deadlines: Deadlines, now: float) -> None:
        self._deadlines = deadlines
        self._looked_at = self._moved_at = now
        self._progress = Progress(0, "initialising")
        self._stopped_since: float | None = None

    def observe(self, now: float, progress: Progress, *, stopped: bool) -> str | None:
        """Take a look; returns why the rank must be ended, or None while all is well."""
        if now - self._looked_at > _GUARD_PAUSE_SECONDS:
            self._moved_at = now
            self._stopped_since = now if stopped else None
        self._looked_at = now
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
