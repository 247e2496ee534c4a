"""The guard's watchdog: detect from outside that a rank makes no progress.

The step counter is the heartbeat of a rank (invariant 6). A rank counts as dead if its counter does
not change for longer than its phase allows, or if a signal has stopped it. The decision depends
only on the counters and the clock that the caller passes in.
"""

from __future__ import annotations

from k2cli.protocol import Deadlines
from k2cli.protocol.progress_page import Phase, Progress
from k2cli.units import format_duration

INTERVAL_SECONDS = 0.25
# If the guard itself did not run for this long (it was stopped, or the machine slept), its view of
# the rank is old, so all clocks restart.
_GUARD_PAUSE_SECONDS = 3.0


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
    """The observed progress of one rank. Times are seconds of one monotonic clock.

    Args:
        deadlines: the longest time without a step, per phase.
        now: the time at which the rank was started.
    """

    def __init__(self, deadlines: Deadlines, now: float) -> None:
        self._deadlines = deadlines
        self._looked_at = self._moved_at = now
        self._progress = Progress(0, "initialising")
        self._stopped_since: float | None = None

    def observe(self, now: float, progress: Progress, *, stopped: bool) -> str | None:
        """Record an observation. Return the reason to end the rank, or None if all is well."""
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
