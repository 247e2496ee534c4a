"""Files that a message quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.chat.attachments import mentioned_files, missing_files, read_attachment, with_attachments
from k2cli.errors import K2Error


def test_mentions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b c.md", "d."):
        Path(name).write_text("x")
    Path("folder").mkdir()
    message = "See @a.py, @\"b c.md\" and @'b c.md' or @d. not me@a.py, @folder or @ann @~nobody/x"
    assert mentioned_files(message) == ["a.py", "b c.md", "d."]


def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "d."):
        Path(name).write_text("x")
    message = 'See @a.py, @d. @b.py, @src/c @"no such.md", or @ann, @v2, me@x.com and @b.py!'
    assert missing_files(message) == ["b.py", "src/c", "no such.md"]


def test_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_bytes(b"\xef\xbb\xbfx = 1\n````\ny")
    Path("empty").write_text("")
    quoted = with_attachments("Why?", [read_attachment("a.py"), read_attachment("empty")])
    assert quoted == (
        "File a.py (3 lines, 12 B):\n\n`````py\nx = 1\n````\ny\n`````\n\n"
        "File empty (0 lines, 0 B):\n\n```\n\n```\n\nWhy?"
    )


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"a\0b")
    Path("latin").write_bytes(b"gr\xfc\xdfe")
    Path("large").write_bytes(b"x" * (4 * 2**20 + 1))
    for name in ("binary", "latin", "large", ".", "nosuch", "/dev/zero"):
        with pytest.raises(K2Error, match=f"'{name}'"):
            read_attachment(name)
