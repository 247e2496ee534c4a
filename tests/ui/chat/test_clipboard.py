"""Copying on a Mac, with a program in place of ``pbcopy``."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.ui.chat.clipboard import copy
from tests.support.as_macos import make_program, on_macos


def test_text_is_copied_as_utf8_whatever_the_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a locale ``pbcopy`` takes its input for Mac OS Roman: é becomes √©."""
    text = 'case "${LC_ALL:-${LC_CTYPE:-$LANG}}" in *UTF-8) cat;; *) iconv -f MACINTOSH;; esac'
    make_program(tmp_path, "pbcopy", f'({text}) > "{tmp_path}/copied"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("LC_ALL", "LANG", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_CTYPE", "C")
    with on_macos():
        assert copy("José — ≈") == "with pbcopy"
    assert (tmp_path / "copied").read_text() == "José — ≈"
