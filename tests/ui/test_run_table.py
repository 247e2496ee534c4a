"""The table of ``k2 ps``: it has all columns in a pipe, and those that fit on a terminal."""

from __future__ import annotations

import sys
import time

import pytest

from k2cli.runs.record import RankRecord, RunRecord
from k2cli.ui.run_table import print_runs

RUN = RunRecord(
    run_id="kimi-k2-thinking-1a2b",
    model="moonshotai/Kimi-K2-Thinking",
    model_name="kimi-k2-thinking",
    state="ready",
    backend="ring",
    strategy="pipeline",
    context_length=131_072,
    ranks=(RankRecord(0, "studio-1"), RankRecord(1, "studio-2")),
    created=time.time(),
    url="http://127.0.0.1:8080",
)


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [
        (120, set()),
        (95, {"WEIGHTS"}),
        (80, {"WEIGHTS", "MODEL"}),
        (20, {"WEIGHTS", "MODEL", "AGE"}),
    ],
)
def test_a_narrow_terminal_shows_the_more_important_columns(
    columns: int,
    left_out: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_runs([RUN], {})
    piped = capsys.readouterr().out.splitlines()
    assert piped[0].split() == ["RUN", "MODEL", "STATE", "RANKS", "WEIGHTS", "AGE", "URL"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_runs([RUN], {})
    shown = capsys.readouterr().out.splitlines()
    assert set(piped[0].split()) - set(shown[0].split()) == left_out
    assert RUN.run_id in shown[1]
    assert RUN.url in shown[1]
    assert columns < 80 or max(map(len, shown)) <= columns
