"""Text that is not k2's own reaches a terminal, a pipe or a log line without control characters."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2cli.errors import K2Error
from k2cli.runs.log import LogEntry, format_entry, parse_entry
from k2cli.ui import output
from k2cli.ui.chat.stream import AnswerWriter
from k2cli.ui.launch_view import LaunchView
from k2cli.units import clean_text, one_line
from tests.test_cli import k2

CLIPBOARD = "\x1b]52;c;cm0gLXJmIC8=\x07"
PASTE = "\x1b[201~rm -rf /\n"
C1 = "\x9b31m\x9d0;title\x9c"
REVERSED = "a\u202egpj.exe\u2066"
HOSTILE = f"start {CLIPBOARD}{C1}{REVERSED}\x7f\x08\r end"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PARTS = st.sampled_from(
    ["\x1b", "[", "]", "52;c;", "31m", "\x9b", "\x9d", "\x90", "\x07", "\x1b\\"]
)


@pytest.mark.parametrize("sequence", [CLIPBOARD, C1, "\x1bP1q\x1b\\", "\x1b[?2004h", "\x1b[1;31m"])
def test_a_whole_sequence_goes(sequence: str) -> None:
    assert clean_text(f"a{sequence}b") == "ab"


@given(st.lists(st.one_of(PARTS, st.text())).map("".join))
def test_nothing_unsafe_is_left(text: str) -> None:
    assert not UNSAFE.search(clean_text(text))
    line = one_line(text)
    assert not UNSAFE.search(line)
    assert "\n" not in line
    assert "\t" not in line


@pytest.mark.parametrize("text", ["größe 中文 🇩🇪👩‍💻\n\tعربي", "plain"])
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert clean_text(text) == text


def test_long_hostile_text_takes_linear_time() -> None:
    for part in ("\x1b]", "\x9d", "\x1b[0", "\x1b[0;", "\x9b"):
        assert not UNSAFE.search(clean_text(part * 500_000))


def test_messages_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    output.note(HOSTILE)
    output.warn(HOSTILE)
    output.print_error(K2Error(f"{HOSTILE}\nerror: false", HOSTILE))
    output.print_text(HOSTILE)
    output.print_json({"text": HOSTILE})
    output.print_json_line({"text": HOSTILE})
    out, err = capsys.readouterr()
    assert not UNSAFE.search(out + err)
    assert "\nerror: false" not in err
    assert json.loads(out.splitlines()[-1]) == {"text": HOSTILE}


def test_an_answer_keeps_line_breaks_and_tabs_and_loses_controls() -> None:
    written = io.StringIO()
    writer = AnswerWriter(written)
    for character in f"a\n\tb{CLIPBOARD}{C1}\u202ec":
        writer.write(character)
    writer.finish()
    assert written.getvalue() == "a\n\tb]52;c;cm0gLXJmIC8=31m0;titlec\n"


def test_a_log_line_stays_one_line_and_reads_back() -> None:
    line = format_entry(
        LogEntry(1.0, "no\x1b[2Jde", "0", f"{HOSTILE}\n2026-01-01 x 0 | false\u2028")
    )
    assert not UNSAFE.search(line)
    assert len(line.splitlines()) == 1
    entry = parse_entry(line)
    assert entry.node == "node"


def test_the_view_of_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    with LaunchView([f"node{CLIPBOARD}\nerror: x"], log=True) as view:
        view.progress(0, f"load{C1}", 0, 0)
        view.line("node", 0, f"{PASTE}error: x")
        view.failed(0, PASTE + "error: x")
        view.restarting(PASTE + "error: x", 2, 1.0)
        view.ready("run", f"model{CLIPBOARD}\nerror: x", "http://localhost")
    err = capsys.readouterr().err
    assert not UNSAFE.search(err)
    assert "\nerror: x" not in err


@pytest.mark.parametrize("name", [f"a{CLIPBOARD}b", "a\nerror: false", "a\x9b2Jb", b"a\xffb"])
def test_the_name_of_a_folder(tmp_path: Path, name: str | bytes) -> None:
    folder = tmp_path / (name if isinstance(name, str) else name.decode(errors="surrogateescape"))
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    done = k2("plan-memory", str(folder))
    assert done.returncode in (1, 2), done.stderr
    assert not UNSAFE.search(done.stdout + done.stderr)
    assert "\nerror: false" not in done.stderr
