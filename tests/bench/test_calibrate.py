"""``k2 bench --calibrate``: which sizes it takes, and the way from a run to ``plan-memory``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from k2cli.bench.calibrate import calibration_cases, deviation_of, figures_of
from k2cli.bench.cases import BenchCase, check_context
from k2cli.bench.measure import RepetitionDone, RowDone, measure
from k2cli.bench.report import BenchRow, Sample
from k2cli.errors import UsageError
from k2cli.planning.calibrated import NOISY_DEVIATION
from k2cli.planning.calibration import MeasuredFigure
from tests.bench.test_bench import Clockwork
from tests.server.commands import run_k2


@pytest.mark.parametrize("rate", [1.0, 5.0, 220.0, 2000.0, 1e6])
@pytest.mark.parametrize("context", [98, 512, 2048, 131_072, None])
def test_sizes_suit_the_speed_and_the_context(rate: float, context: int | None) -> None:
    cases = calibration_cases(rate, context, 2)
    check_context(cases, context)
    assert [case.kind for case in cases] == ["pp", "pp", "tg", "tg", "tg"]
    short, long = cases[0].tokens, cases[1].tokens
    assert 32 <= short <= long / 2
    assert long <= max(64, rate * 6)
    assert [case.depth for case in cases[2:]] == [short, long, short]
    assert len(calibration_cases(rate, context, 1)) == 4


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="a context of 64 tokens is too short"):
        calibration_cases(100.0, 64, 1)


def test_figures_are_medians_in_the_middle_of_what_was_generated() -> None:
    samples = tuple(Sample(rate, 1.0, 1.0) for rate in (90.0, 100.0, 10.0, 91.0, 89.0))
    rows = [
        BenchRow(BenchCase("pp", 64), "server", samples),
        BenchRow(BenchCase("tg", 32, 64, 2), "client", samples),
    ]
    deviation = deviation_of([90.0, 100.0, 10.0, 91.0, 89.0])
    assert figures_of(rows) == [
        MeasuredFigure("prefill", 64, 1, 90.0, deviation),
        MeasuredFigure("decode", 80, 2, 90.0, deviation),
    ]


def test_prompts_before_answers_count_as_prompts_too() -> None:
    prompts = tuple(Sample(64 / seconds, seconds, seconds) for seconds in (1.0, 9.0))
    answers = tuple(Sample(8.0, 4.0, seconds) for seconds in (1.0, 1.1))
    rows = [
        BenchRow(BenchCase("pp", 64), "server", prompts),
        BenchRow(BenchCase("tg", 32, 64), "server", answers),
        BenchRow(BenchCase("tg", 32, 64, 2), "client", answers),
        BenchRow(BenchCase("tg", 32, 128), "server", answers),
    ]
    figure = figures_of(rows)[0]
    assert figure.tokens_per_second == statistics.median([64, 64 / 9, 64, 64 / 1.1])


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
    assert all(value > 0 for value in found["rates"].values())
    assert len(found["figures"]) >= 4
    assert "k2 plan-memory uses it for these machines" in done.stderr
    speed = json.loads(run_k2(*plan, "this").stdout)["speed"]
    assert "by k2 bench --calibrate" in speed["source"]
    band = speed["decode_tokens_per_second"]
    assert 0 < band["low"] < band["expected"] < band["high"] <= 2.001 * band["low"]


def test_a_server_without_a_plan_cannot_be_calibrated() -> None:
    done = run_k2("bench", "--url", "http://127.0.0.1:9", "--calibrate")
    assert done.returncode == 2
    assert "--calibrate needs a run of this machine" in done.stderr
