"""The lines of the live view: widths, bars, odd values."""

from __future__ import annotations

import pytest
from rich.text import Text

from k2cli.client.status_document import status_document
from k2cli.client.status_watch import Observation
from k2cli.ui.chat.width import text_width
from k2cli.ui.top.columns import table, text_column
from k2cli.ui.top.look import Look
from k2cli.ui.top.screen import screen_of
from k2cli.ui.top.state import TopState
from k2cli.units import GB
from tests.ui.top.statuses import document, members, rank, request, watched

WIDE = "模型🚀é" * 20
MARKS = "e\u0301" * 200


def plain(state: TopState, width: int = 80, height: int = 60, look: Look | None = None) -> str:
    screen = screen_of(state, 100.0, width, height, 0, look or Look())
    return "\n".join(line.plain for line in screen.lines)


def seen(**changed: object) -> TopState:
    state = TopState("run x", 1.0, 0.0)
    state.observe(Observation(100.0, document(**changed)))
    return state


@pytest.mark.parametrize("width", [1, 2, 5, 12, 13, 20, 39, 40, 63, 80, 121, 200, 500])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    hostile = seen(
        model={"name": WIDE}, cause=WIDE, state=WIDE, run_id=WIDE,
        ranks=[rank(0, 500.0, node=WIDE, gpu=WIDE, phase=WIDE), rank(1, 0.0)],
        requests={"decode": 2, "queued": 1, "listed": [request(WIDE, key=WIDE, id=WIDE)]},
        link={"transport": WIDE, "strategy": WIDE, "interfaces": [WIDE] * 3, "reason": WIDE},
        totals={"requests": {WIDE: 1, "completed": 2**53}, "prompt_tokens": 2**53},
    )  # fmt: skip
    for state in (hostile, watched(1.0, 0.0, None), TopState(WIDE, 1.0, 0.0)):
        for height in (1, 2, 10, 60):
            screen = screen_of(state, 100.0, width, height, 7, Look())
            assert len(screen.lines) == height
            assert max(text_width(line.plain) for line in screen.lines) <= width


def test_ascii_where_the_terminal_has_no_unicode() -> None:
    text = plain(watched(1.0, 2.0), look=Look(unicode=False))
    assert text.isascii()
    assert "######" in text


@pytest.mark.parametrize("width", [1, 5, 40, 81])
def test_marks_without_a_width_do_not_widen_ascii(width: int) -> None:
    state = seen(
        model={"name": MARKS}, cause=MARKS, requests={"listed": [request("decode", key=MARKS)]}
    )
    screen = screen_of(state, 100.0, width, 60, 0, Look(unicode=False))
    assert max(len(line.plain) for line in screen.lines) <= width


def test_a_server_that_lists_a_hundred_thousand_requests() -> None:
    state = seen(requests={"queued": 5, "listed": [request("decode")] * 100_000})
    screen = screen_of(state, 100.0, 80, 1000, 0, Look())
    assert len([line for line in screen.lines if "0/8,192" in line.plain]) == 256
    assert "99744 more are not listed" in plain(state, 80, 1000)


def test_a_rank_above_its_plan_and_one_that_is_still_are_marked() -> None:
    state = seen(ranks=[rank(0, 470.0), rank(1, 100.0, progress_age_seconds=34.0)])
    screen = screen_of(state, 100.0, 120, 40, 0, Look())
    (over,) = (line for line in screen.lines if "over plan" in line.plain)
    assert any("red" in str(span.style) for span in over.spans)
    assert "34 s" in plain(state, 80)


def test_the_history_has_gaps_where_nothing_answered() -> None:
    text = plain(watched(10.0, 5.0, None, None, 0.0, 10.0))
    assert "            █▅  ▁█  max 10.0 in 5.0 s" in text


def test_a_loading_rank_and_a_run_of_an_older_version() -> None:
    loading = rank(0, 0.0, phase="loading", loaded_bytes=GB, load_bytes=4 * GB, layers=None)
    text = plain(seen(ranks=[loading], kv_cache=None, totals={}, link={}))
    assert "loading 25 %" in text
    assert "KV cache    not known yet" in text
    assert "one rank, no link" in text
    known = {"model", "state", "ranks", "requests", "throughput"}
    old = {name: value for name, value in members().items() if name in known}
    state = TopState("run x", 1.0, 0.0)
    state.observe(Observation(100.0, status_document(old)))
    assert "kimi-k2" in plain(state)


def test_another_run_begins_a_new_history() -> None:
    state = watched(1.0, 2.0)
    state.observe(Observation(101.0, document(run_id="other")))
    assert len(state.history) == 1


def test_columns_are_left_out_by_importance() -> None:
    columns = [
        text_column("FIRST", ["a" * 20], 3, least=6),
        text_column("SECOND", ["b"], 1),
        text_column("THIRD", ["cc"], 2, right=True),
    ]

    def lines(width: int) -> list[str]:
        return [line.plain for line in table(columns, width, "")]

    assert lines(60) == ["FIRST                 SECOND  THIRD", f"{'a' * 20}  b          cc"]
    assert lines(21) == ["FIRST   SECOND  THIRD", "aaaaa…  b          cc"]
    assert lines(20) == ["FIRST          THIRD", "aaaaaaaaaaaa…     cc"]
    assert lines(8) == ["FIRST", "aaaaaaa…"]
    assert lines(3) == ["FI…", "aa…"]


def test_bars() -> None:
    bar = Look().bar

    def cells(parts: list[int], whole: int) -> str:
        return bar(parts, whole, 10, ("", "")).plain

    assert cells([50, 20], 100) == "█████▒▒···"
    assert cells([1, 1], 1000) == "█▒········"
    assert cells([0, 0], 100) == "··········"
    assert cells([90, 90], 100) == "█████████▒"
    assert cells([5, 5], 0) == "··········"
    assert isinstance(bar([1, 1], 2, 0, ("", "")), Text)
