"""The guard's watchdog: detect from outside that a rank makes no progress.

This module alone decides how long a rank may take, for leader and followers alike. The step counter
is the heartbeat of a rank (invariant 6), and two limits apply to a rank that completes no step:

* a short one, by phase, if neither the rank nor any other rank of its run is at work;
* a long one (``work_stall``) in any case, because work may also go on for ever.

Work is what ``guard.work`` sees: compilers, pages and files that are read, memory that is touched
for the first time. A cold start does these for minutes within one step, and the other ranks wait
for it, so work counts for the whole run. Processor time is weaker evidence: a rank that waits for
another one may spin. It counts for the rank itself, in phases in which long computing is expected,
and for no other rank. A rank that a signal has stopped is ended sooner.

Pauses of the guard do not count. The decision depends only on what the caller passes in: the
counters, the clock, and the work seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2cli.pauses import PauseAwareClock
from k2cli.protocol import Deadlines
from k2cli.protocol.progress_page import Phase, Progress
from k2cli.units import format_duration

# After a pause of this length the rank gets its whole time again: it was likely stopped too, and
# its memory may have to be read back from the disk.
_LONG_PAUSE_SECONDS = 3.0
# A rank in a joint step may be waiting for one that hangs elsewhere. It gets more time, so that the
# guard of the other one is the first to report.
_JOINT_FACTOR = 1.25


@dataclass(frozen=True, slots=True)
class Work:
    """Signs of work that were seen in one interval.

    ``signs`` are words for the user about what cannot be mere waiting; empty if there are none.
    ``computes``: the rank used a good part of a core.
    """

    signs: tuple[str, ...] = ()
    computes: bool = False


NO_WORK = Work()


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that a rank may take for one step.

    Args:
        idle_seconds: while there is no sign of work.
        working_seconds: in any case.
        computing_counts: True if processor time of the rank is a sign of work.
    """

    idle_seconds: float
    working_seconds: float
    computing_counts: bool


def patience_of(phase: Phase, deadlines: Deadlines, *, joint: bool = False) -> Patience:
    """Return the time that a rank may take for a step in ``phase``."""
    computing_counts = False
    match phase:
        case "initialising":
            seconds, computing_counts = deadlines.initialisation, True
        case "loading" | "checking":
            seconds, computing_counts = deadlines.load_stall, True
        case "warming up" | "computing a new shape":
            seconds, computing_counts = deadlines.warmup_stall, True
        case "waiting":
            seconds = deadlines.peer_stall
        case "idle" | "busy" | "ending":
            seconds = deadlines.step_stall
    if joint:
        seconds *= _JOINT_FACTOR
    return Patience(seconds, max(seconds, deadlines.work_stall), computing_counts)


class StallWatch:
    """The observed progress of one rank, which was started now.

    Args:
        deadlines: the longest time without a step, per phase.
        clock: read at each observation.
    """

    def __init__(self, deadlines: Deadlines, clock: PauseAwareClock) -> None:
        self._deadlines = deadlines
        self._clock = clock
        self._moved_at = self._worked_at = clock.now()
        self._paused_seconds = clock.paused_seconds
        self._progress = Progress(0, "initialising")
        self._stopped_since: float | None = None
        self._work = NO_WORK

    def still_seconds(self, now: float) -> float:
        """Return the time since the rank's last step."""
        return now - self._moved_at

    def observe(
        self,
        progress: Progress,
        *,
        stopped: bool,
        work: Work = NO_WORK,
        others_worked_at: float | None = None,
    ) -> str | None:
        """Record an observation. Return the reason to end the rank, or None if all is well.

        Args:
            progress: the rank's phase and counter.
            stopped: True if a signal has stopped it.
            work: what the rank has done since the last observation.
            others_worked_at: when another rank of the run was last known to be at work, by the
                same clock.
        """
        now = self._clock.now()
        if self._clock.paused_seconds - self._paused_seconds > _LONG_PAUSE_SECONDS:
            self._moved_at = self._worked_at = now
            self._stopped_since = now if stopped else None
        self._paused_seconds = self._clock.paused_seconds
        if progress != self._progress:
            self._progress, self._moved_at, self._work = progress, now, NO_WORK
        if work != NO_WORK:
            self._work = Work(work.signs or self._work.signs, work.computes)
        if work.signs or (work.computes and self._patience.computing_counts):
            self._worked_at = now
        self._worked_at = max(self._worked_at, self._moved_at, others_worked_at or 0.0)
        if not stopped:
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        return self._verdict(now)

    @property
    def _patience(self) -> Patience:
        progress = self._progress
        return patience_of(progress.phase, self._deadlines, joint=progress.joint)

    @property
    def _work_seen(self) -> str:
        if self._work.signs:
            return ", ".join(self._work.signs)
        return "processor time" if self._work.computes else "of other ranks"

    def _verdict(self, now: float) -> str | None:
        if self._stopped_since is not None and now - self._stopped_since > self._deadlines.stopped:
            return f"it was stopped (SIGSTOP) for {format_duration(now - self._stopped_since)}"
        still, patience = self.still_seconds(now), self._patience
        if still <= patience.idle_seconds:
            return None
        shared = " with the other ranks" if self._progress.joint else ""
        cause = f"it made no progress for {format_duration(still)} while {self._progress.phase}"
        if still > patience.working_seconds:
            return f"{cause}{shared}, although there was work ({self._work_seen})"
        if now - self._worked_at > patience.idle_seconds:
            seen = "nothing but processor time" if self._work.computes else "no processor time"
            return f"{cause}{shared}, and used {seen}"
        return None
