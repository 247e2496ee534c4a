"""The line about slow work: after a while, and not for quick work."""

from __future__ import annotations

import time

import pytest

from k2cli.ui import slow


def test_only_slow_work_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with slow.told_if_slow("reading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(slow, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(slow, "_NEXT_SECONDS", 0.01)
    said = ""
    with slow.told_if_slow("reading"):
        while "reading, for " not in said:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert said.startswith("reading ...\n")
