"""Rates are read off answers as their definitions say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.overlap import OVERLAP, TITLES, overlap_rows
from benchmarks.report import (
    BEGIN,
    END,
    Row,
    document,
    into_document,
    merged,
    replace_rows,
    rows_of,
    table,
)
from benchmarks.statistics import (
    Answer,
    decode_rate,
    order_of_round,
    prefill_rate,
    ratios,
    summary,
    whole_rate,
)
from benchmarks.work import BenchmarkModel, decode, english_prompt, prefill


def _answer(first: float, interval: float, tokens: int, per_token: int = 1) -> Answer:
    marks = tuple((first + n * interval, (n + 1) * per_token) for n in range(tokens))
    return Answer(16, tokens, marks, "text")


def test_decode_rate_of_one_answer_leaves_out_the_first_token() -> None:
    assert decode_rate([_answer(5.0, 0.1, 11)]) == pytest.approx(10.0)


def test_decode_rate_counts_only_while_all_are_answered() -> None:
    early, late = _answer(0.0, 0.1, 41), _answer(1.0, 0.05, 41, per_token=4)
    # From 1.0 to 3.0: 20 tokens of the one, 40 of the other.
    assert decode_rate([early, late]) == pytest.approx(30.0)


def test_answers_that_do_not_overlap_have_no_common_rate() -> None:
    assert decode_rate([_answer(0.0, 0.1, 5), _answer(9.0, 0.1, 5)]) == 0.0


def test_rates_from_sending() -> None:
    answers = [_answer(1.0, 0.5, 3), _answer(2.0, 1.0, 3)]
    assert whole_rate(answers) == pytest.approx(6 / 4.0)
    assert prefill_rate(answers) == pytest.approx(32 / 2.0)


def test_ratio_above_one_is_always_in_favour_of_k2() -> None:
    assert ratios([2.0, 3.0], [1.0, 1.0], more_is_better=True).median == 2.5
    assert ratios([2.0], [1.0], more_is_better=False).median == 0.5


def test_order_alternates() -> None:
    assert [order_of_round(n)[0] for n in range(4)] == [0, 1, 0, 1]


def _row(ratio: float, target: float | None) -> Row:
    one = summary([10.0])
    return Row("m", "one", "decode", "tok/s", one, one, summary([ratio]), target, 3, 4)


def test_table_says_whether_a_target_is_met() -> None:
    lines = table([_row(0.9, 1.0), _row(1.6, 1.5), _row(1.0, None)]).splitlines()[2:]
    assert "| 1.00 missed | 3 of 4 |" in lines[0]
    assert "| 1.50 met |" in lines[1]
    assert "met" not in lines[2]


def test_table_goes_between_its_marks_and_nowhere_else() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter \\1\n"
    assert into_document(page, "new \\1") == f"before\n{BEGIN}\n\nnew \\1\n\n{END}\nafter \\1\n"
    with pytest.raises(ValueError, match="one"):
        into_document("no marks", "new")


def test_starts_measured_again_replace_their_lines_of_a_page() -> None:
    first, old = _row(0.9, 1.0), replace(_row(0.8, None), work="start")
    new = replace(old, unit="s")
    page = f"text\n{table([first, old])}\n"
    assert replace_rows(page, [new]) == f"text\n{table([first, new])}\n"


def test_a_part_measured_again_replaces_its_rows_and_no_others() -> None:
    old = [_row(0.9, 1.0), replace(_row(0.8, None), work="prefill")]
    read = rows_of(json.loads(json.dumps(document(old, {}))))
    assert read == old
    new = [_row(1.2, 1.0), replace(_row(1.0, None), model="other")]
    assert merged(read, new) == [new[0], old[1], new[1]]


def _prefill_row(kind: str, *rates: float) -> Row:
    ours = summary(rates)
    return Row("m", TITLES[kind], "prefill, 2048 tokens", "tok/s", ours, ours, summary([1.0]), 1.0)


def test_two_ranks_are_compared_with_one_where_rounds_are_as_many(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other, two = (
        _prefill_row("single", 30.0, 30.0),
        _prefill_row("library", 30.0, 32.0, 40.0),
        _prefill_row("pipeline", 60.0, 48.0, 64.0),
    )
    (row,) = overlap_rows([one, other, two])
    assert (row.placement, row.ratio.samples) == (OVERLAP, (2.0, 1.5, 1.6))
    assert capsys.readouterr().err == ""
    # As when a part was measured again with --only and another number of rounds.
    assert overlap_rows([one, two]) == []
    assert "3 rounds, 2" in capsys.readouterr().err
    assert overlap_rows([two]) == []


def test_a_long_prompt_takes_part_in_fewer_rounds() -> None:
    model = BenchmarkModel("m", english_prompt, 8, 2048, 128, long_rounds=2, first_tokens=256)
    assert model.rounds_of(prefill(1.0), 5) == 2
    assert model.rounds_of(prefill(1.0), 1) == 1
    assert model.rounds_of(decode(1, 1.0), 5) == 5
    assert model.at_first.prefill_tokens == 256
    assert replace(model, long_rounds=None).rounds_of(prefill(1.0), 5) == 5
