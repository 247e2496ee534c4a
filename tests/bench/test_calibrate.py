"""``k2 bench --calibrate``: which sizes it takes, and the way from a run to ``plan-memory``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2cli.bench.calibrate import deviation_of, figures_of
from k2cli.bench.calibration_rounds import (
    BUDGET_SECONDS,
    PROBE,
    Rounds,
    calibration_cases,
    calibration_schedule,
)
from k2cli.bench.cases import BenchCase, check_context
from k2cli.bench.measure import RepetitionDone, RowDone, measure
from k2cli.bench.report import BenchRow, Sample
from k2cli.errors import UsageError
from k2cli.planning.speed.calibrations import NOISY_DEVIATION
from tests.commands.test_bench import Clockwork
from tests.server.commands import run_k2


@pytest.mark.parametrize("rate", [1.0, 5.0, 220.0, 2000.0, 1e6])
@pytest.mark.parametrize("context", [98, 512, 2048, 131_072, None])
def test_sizes_suit_the_speed_and_the_context(rate: float, context: int | None) -> None:
    cases = calibration_cases(rate, rate / 2, context, 2)
    check_context(cases, context)
    assert [(case.kind, case.concurrency) for case in cases] == [("tg", 1), ("tg", 1), ("tg", 2)]
    short, long, beside = (case.depth for case in cases)
    assert 32 <= short == beside <= long / 2
    assert long <= max(64, rate * 6)
    assert 16 <= cases[0].tokens <= max(16, min(rate, 32))
    assert len(calibration_cases(rate, rate, context, 1)) == 2


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="a context of 64 tokens is too short"):
        calibration_cases(100.0, 10.0, 64, 1)


def probed(prefill: float, decode: float) -> BenchRow:
    return BenchRow(PROBE, "server", (Sample(decode, 1.0, PROBE.prompt_tokens / prefill),))


def test_rounds_fit_the_budget_and_are_said_before() -> None:
    quick, slow = (calibration_schedule(probed(*rates), 2048, 2, 5)
                   for rates in ((2000.0, 50.0), (10.0, 8.0)))  # fmt: skip
    assert quick.rounds == 5
    assert 3 <= slow.rounds < 5
    for each in (quick, slow):
        assert each.expected_seconds <= BUDGET_SECONDS
        assert each.most_seconds == max(60.0, 1.5 * each.expected_seconds)
    assert calibration_schedule(probed(10.0, 8.0), 2048, 2, 1).rounds == 1
    crawling = calibration_schedule(probed(1.0, 1.0), 2048, 2, 5)
    assert crawling.rounds == 3  # fewer cannot tell noise from speed
    assert crawling.most_seconds == 1.5 * crawling.expected_seconds > BUDGET_SECONDS


def test_no_round_begins_that_would_last_too_long() -> None:
    """A server that has become slow since it was probed is given up on, with rows."""
    clock = Clockwork()
    schedule = calibration_schedule(probed(2000.0, 100.0), 2048, 2, 5)
    rounds = Rounds(schedule, lambda: 4 * clock.now)
    events = measure(
        clock, rounds.schedule.cases, 5, in_turns=True, warm_up=False, enough=rounds.enough
    )
    for event in events:
        if isinstance(event, RepetitionDone):
            rounds.add(event)
    assert 1 <= rounds.complete < 5
    assert 4 * clock.now <= rounds.schedule.most_seconds
    assert [len(row.samples) for row in rounds.rows()] == [rounds.complete] * 3


def test_an_interrupted_round_does_not_count() -> None:
    rounds = Rounds(calibration_schedule(probed(500.0, 50.0), 2048, 2, 5))
    assert rounds.rows() == []
    for index, case in [(1, 0), (1, 1), (1, 2), (2, 0)]:
        sample = Sample(index, 1.0, 1.0)
        rounds.add(RepetitionDone(rounds.schedule.cases[case], index, 5, sample, "server"))
    assert rounds.complete == 1
    assert [row.rates for row in rounds.rows()] == [[1], [1], [1]]


def test_figures_are_medians_in_the_middle_of_what_was_generated() -> None:
    samples = tuple(Sample(rate, 1.0, 64 / rate) for rate in (90.0, 100.0, 10.0, 91.0, 89.0))
    rows = [
        BenchRow(BenchCase("tg", 32, 64), "server", samples),
        BenchRow(BenchCase("tg", 32, 64, 2), "client", samples),
    ]
    deviation = deviation_of([90.0, 100.0, 10.0, 91.0, 89.0])
    assert [(f.kind, f.tokens, f.concurrency, round(f.tokens_per_second, 6)) for f in
            figures_of(rows)] == [
        ("prefill", 64, 1, 90.0), ("decode", 80, 1, 90.0), ("decode", 80, 2, 90.0),
    ]  # fmt: skip
    assert all(f.deviation == pytest.approx(deviation) for f in figures_of(rows))


def test_one_disturbed_repetition_is_no_noise_and_a_busy_machine_is() -> None:
    assert deviation_of([90.0, 100.0, 10.0, 91.0, 89.0]) < NOISY_DEVIATION
    assert deviation_of([90.0, 60.0, 40.0, 100.0, 89.0]) > NOISY_DEVIATION
    assert deviation_of([50.0, 100.0]) == 0.0  # too few to tell


def test_cases_are_measured_in_turns() -> None:
    cases = [BenchCase("pp", 20), BenchCase("tg", 8)]
    events = list(measure(Clockwork(), cases, 2, in_turns=True))
    order = [event.case.kind for event in events if isinstance(event, RepetitionDone)]
    assert order == ["pp", "tg"] * 3
    rows = [event.row for event in events if isinstance(event, RowDone)]
    assert [(row.case, len(row.samples)) for row in rows] == [(case, 2) for case in cases]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_calibrated_machine_is_predicted(
    toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K2_CONFIG_DIR", str(tmp_path / "config"))
    plan = ("plan-memory", str(toy_k2), "--context", "128", "--json", "--hardware")
    before = json.loads(run_k2(*plan, "this").stdout)
    assert before["speed"] is None
    assert "k2 bench --calibrate" in before["speed_note"]
    launched = run_k2("launch", str(toy_k2), "--context", "130", "--detach")
    assert launched.returncode == 0, launched.stderr
    try:
        done = run_k2("bench", "--calibrate", "-r", "1", "-o", "json")
    finally:
        run_k2("stop", "--all")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["calibration"]
    assert found["file"] == str(tmp_path / "config" / "calibration.json")
    assert found["collective_seconds"] is None
    # The toy's attention is latent: how fast a shared cache is loaded was not measured.
    assert all(value is None or value > 0 for value in found["rates"].values())
    assert sum(value is not None for value in found["rates"].values()) >= 2
    assert len(found["figures"]) >= 4
    assert all(0 < share < 3 for share in found["spread"].values())
    assert "1 round in about" in done.stderr
    assert "k2 plan-memory uses it for these machines" in done.stderr
    speed = json.loads(run_k2(*plan, "this").stdout)["speed"]
    assert "by k2 bench --calibrate" in speed["source"]
    band = speed["decode_tokens_per_second"]
    assert 0 < band["low"] < band["expected"] < band["high"] <= 2.001 * band["low"]


def test_a_server_without_a_plan_cannot_be_calibrated() -> None:
    done = run_k2("bench", "--url", "http://127.0.0.1:9", "--calibrate")
    assert done.returncode == 2
    assert "--calibrate needs a run of this machine" in done.stderr
