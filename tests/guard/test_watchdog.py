"""The watchdog's judgement, with a clock of its own."""

from __future__ import annotations

import pytest

from k2cli.guard.watchdog import StallWatch, phase_deadline
from k2cli.protocol import Deadlines
from k2cli.protocol.progress_page import PHASES, Phase, Progress

DEADLINES = Deadlines()


def _verdict_after(phase: Phase, seconds: float, *, stopped: bool = False) -> str | None:
    """Look every half second at a rank that stands still in ``phase``."""
    watch = StallWatch(DEADLINES, 0.0)
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
    watch = StallWatch(DEADLINES, 0.0)
    for tick in range(200):
        # Stopped for 6 of 8 seconds, one step every 5: slow, but alive.
        verdict = watch.observe(tick / 2, Progress(tick // 10, "busy"), stopped=tick % 16 < 12)
        assert verdict is None


def test_a_guard_that_did_not_run_itself_does_not_blame_its_rank() -> None:
    watch = StallWatch(DEADLINES, 0.0)
    watch.observe(0.5, Progress(1, "idle"), stopped=False)
    assert watch.observe(3600.0, Progress(1, "idle"), stopped=False) is None
    assert watch.observe(3600.5, Progress(1, "idle"), stopped=False) is None
