"""The watchdog's judgement, with a clock of its own."""

from __future__ import annotations

import pytest

from k2cli.guard.watchdog import StallWatch, phase_deadline
from k2cli.pauses import PauseAwareClock
from k2cli.protocol import Deadlines
from k2cli.protocol.progress_page import PHASES, Phase, Progress

DEADLINES = Deadlines()


class Watched:
    """A watch whose clock shows what the test says."""

    def __init__(self) -> None:
        self.now = 0.0
        self._watch = StallWatch(DEADLINES, PauseAwareClock(lambda: self.now))

    def observe(self, now: float, progress: Progress, *, stopped: bool = False) -> str | None:
        self.now = now
        return self._watch.observe(progress, stopped=stopped)


def _verdict_after(phase: Phase, seconds: float, *, stopped: bool = False) -> str | None:
    """Look every half second at a rank that stands still in ``phase``."""
    watch = Watched()
    verdict = None
    for tick in range(1, int(seconds * 2) + 1):
        verdict = watch.observe(tick / 2, Progress(7, phase), stopped=stopped)
        if verdict is not None:
            break
    return verdict


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_has_its_own_patience(phase: Phase) -> None:
    limit = phase_deadline(phase, DEADLINES)
    assert _verdict_after(phase, limit - 1) is None
    verdict = _verdict_after(phase, limit + 2)
    assert verdict is not None
    assert phase in verdict


def test_a_stopped_rank_has_less_time_than_one_that_loads() -> None:
    verdict = _verdict_after("loading", DEADLINES.stopped + 2, stopped=True)
    assert verdict is not None
    assert "SIGSTOP" in verdict
    assert _verdict_after("idle", DEADLINES.stopped - 1, stopped=True) is None


def test_progress_and_continuing_start_the_clocks_anew() -> None:
    watch = Watched()
    for tick in range(200):
        # Stopped for 6 of 8 seconds, one step every 5: slow, but alive.
        verdict = watch.observe(tick / 2, Progress(tick // 10, "busy"), stopped=tick % 16 < 12)
        assert verdict is None


def test_a_guard_that_did_not_run_itself_does_not_blame_its_rank() -> None:
    watch = Watched()
    watch.observe(0.5, Progress(1, "idle"))
    assert watch.observe(3600.0, Progress(1, "idle")) is None
    assert watch.observe(3600.5, Progress(1, "idle"), stopped=True) is None


def test_a_rank_that_hangs_is_found_however_often_its_guard_is_late() -> None:
    watch = Watched()
    limit = 4 * (DEADLINES.step_stall + 1)  # a late look counts for a quarter of a second
    looks = (watch.observe(look * 1.2, Progress(1, "idle")) for look in range(int(limit)))
    assert any(looks)
