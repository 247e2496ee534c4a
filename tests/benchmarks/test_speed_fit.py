"""The constants and the page are what the fit gives, and the fit predicts what it did not see."""

from __future__ import annotations

import tomllib

import pytest

from benchmarks.speed_fit.document import constants_toml, document
from benchmarks.speed_fit.evaluate import summarise
from benchmarks.speed_fit.main import DOCUMENT
from benchmarks.speed_fit.outcome import Outcome, run_fit
from benchmarks.speed_fit.rows import read_rows, split_rows
from k2cli.planning.speed.constants import CONSTANTS_FILE


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return run_fit()


def test_constants_and_page_are_what_the_fit_gives(outcome: Outcome) -> None:
    text = CONSTANTS_FILE.read_text(encoding="utf-8")
    assert constants_toml(outcome, tomllib.loads(text)["fitted_on"]) == text
    assert document(outcome) == DOCUMENT.read_text(encoding="utf-8")


def test_rows_held_out_are_predicted(outcome: Outcome) -> None:
    """The targets: 80 % inside a band whose high is at most twice its low, median error 30 %."""
    for rows in (outcome.held_out, outcome.folds, outcome.sources):
        found = summarise(rows)
        assert found.inside >= 0.8
        assert found.median_error <= 0.3
        assert found.widest <= 2.0001
    mlx = summarise([one for one in outcome.held_out if one.row.engine == "mlx"])
    assert mlx.count >= 25
    assert mlx.inside >= 0.8
    assert mlx.median_error <= 0.3


def test_every_row_is_used_or_has_a_reason_and_the_halves_share_nothing() -> None:
    usable, unusable = read_rows()
    rows = {one.row for one in usable} | {one.row for one in unusable}
    assert len(rows) == 129
    assert all(one.source.startswith("https://") for one in usable)
    assert all(one.reason for one in unusable)
    fitted, held_out = split_rows(usable)
    assert len(fitted) + len(held_out) == len(usable)
    assert not {(o.row, o.quantity) for o in fitted} & {(o.row, o.quantity) for o in held_out}
    for stratum in {one.stratum for one in usable}:
        counts = [sum(o.stratum == stratum for o in half) for half in (fitted, held_out)]
        assert abs(counts[0] - counts[1]) <= 1
