"""Following a log that is rotated at the worst moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from k2cli.runs import log
from k2cli.runs.log import follow


def _follow(
    path: Path, steps: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Follow a log; at each look at it, the next step is taken, and the run is over after them."""

    def over() -> bool:
        if steps:
            steps.pop(0)()
        return not steps

    monkeypatch.setattr(log, "_POLL_SECONDS", 0.0)
    return list(follow(path, None, over))


def test_no_line_is_lost_when_the_log_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.log"
    path.write_text("one\n")

    def rotate() -> None:
        with path.open("a") as file:
            file.write("two\n")  # nobody has read it when the file gets its other name
        path.replace(tmp_path / "run.log.1")
        path.write_text("three\n")

    assert _follow(path, [rotate], monkeypatch) == ["one", "two", "three"]


def test_a_log_that_is_between_its_two_names_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.log"
    path.write_text("one\n")
    steps = [
        lambda: path.rename(tmp_path / "run.log.1"),
        lambda: None,
        lambda: path.write_text("two\n"),
    ]
    assert _follow(path, steps, monkeypatch) == ["one", "two"]


def test_a_log_that_is_gone_again_before_it_is_opened_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "run.log", log._opened
    path.write_text("one\n")
    looks = []

    def gone_once(asked: Path) -> object:
        looks.append(asked)
        if len(looks) == 1:
            raise FileNotFoundError(asked)
        return opened(asked)

    monkeypatch.setattr(log, "_opened", gone_once)
    assert _follow(path, [lambda: None, lambda: None], monkeypatch) == ["one"]
