"""The watchdog's judgement, with a clock of its own."""

from __future__ import annotations

import pytest

from k2cli.guard.watchdog import NO_WORK, StallWatch, Work, patience_of
from k2cli.pauses import PauseAwareClock
from k2cli.protocol import Deadlines
from k2cli.protocol.progress_page import PHASES, Phase, Progress

DEADLINES = Deadlines()


class Watched:
    """A watch whose clock shows what the test says."""

    def __init__(self) -> None:
        self.now = 0.0
        self._watch = StallWatch(DEADLINES, PauseAwareClock(lambda: self.now))

    def observe(
        self,
        now: float,
        progress: Progress,
        *,
        stopped: bool = False,
        work: Work = NO_WORK,
        others_worked_at: float | None = None,
    ) -> str | None:
        self.now = now
        return self._watch.observe(
            progress, stopped=stopped, work=work, others_worked_at=others_worked_at
        )


def _verdict_after(
    phase: Phase,
    seconds: float,
    *,
    stopped: bool = False,
    work: Work = NO_WORK,
    joint: bool = False,
    others_work: bool = False,
) -> str | None:
    """Look every half second at a rank that stands still in ``phase``."""
    watch = Watched()
    verdict = None
    for tick in range(1, int(seconds * 2) + 1):
        verdict = watch.observe(
            tick / 2,
            Progress(7, phase, joint),
            stopped=stopped,
            work=work,
            others_worked_at=tick / 2 if others_work else None,
        )
        if verdict is not None:
            break
    return verdict


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_has_its_own_patience(phase: Phase) -> None:
    limit = patience_of(phase, DEADLINES).idle_seconds
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


COMPILES = Work(("compilers ran",), computes=True)
COMPUTES = Work(computes=True)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("others_work", [False, True])
def test_work_of_any_rank_is_waited_for_but_not_for_ever(phase: Phase, others_work: bool) -> None:
    work = NO_WORK if others_work else COMPILES
    long = DEADLINES.work_stall
    assert _verdict_after(phase, long - 1, work=work, others_work=others_work) is None
    verdict = _verdict_after(phase, long + 2, work=work, others_work=others_work)
    assert verdict is not None
    assert "although there was work" in verdict
    assert ("(compilers ran)" in verdict) == (not others_work)


@pytest.mark.parametrize("phase", PHASES)
def test_processor_time_counts_only_where_long_computing_is_expected(phase: Phase) -> None:
    """A rank that waits in a sum polls, and must not live for it when requests are served."""
    patience = patience_of(phase, DEADLINES)
    expected = phase not in ("idle", "busy", "waiting", "ending")
    assert patience.computing_counts == expected
    verdict = _verdict_after(phase, patience.idle_seconds + 2, work=COMPUTES)
    assert (verdict is None) == expected
    if verdict is not None:
        assert verdict.endswith("and used nothing but processor time")


def test_leader_and_follower_have_the_same_time_and_the_one_outside_a_sum_is_named() -> None:
    seconds = DEADLINES.warmup_stall + 2
    assert _verdict_after("warming up", seconds, joint=True) is None
    assert _verdict_after("warming up", seconds) is not None
    shared = _verdict_after("warming up", 1.25 * seconds, joint=True)
    assert shared is not None
    assert "while warming up with the other ranks" in shared
    assert DEADLINES.peer_stall > 1.25 * DEADLINES.warmup_stall
