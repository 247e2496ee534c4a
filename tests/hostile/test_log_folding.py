"""Repeated log lines and tracebacks are folded, and no sender can fill the log."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.supervisor.line_folder import (
    BURST_LINES,
    LINES_PER_SECOND,
    WINDOW_SECONDS,
    LineFolder,
)
from tests.support.harness import supervised

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "selector_events.py", line 178, in _accept_connection',
    "    conn, addr = sock.accept()",
    "OSError: [Errno 24] Too many open files",
]


class Log:
    """A folder of lines with a clock that only the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.written: list[tuple[str, str]] = []
        self.folder: LineFolder[str] = LineFolder(
            lambda sender, line: self.written.append((sender, line)), lambda: self.seconds
        )

    def add(self, *lines: str, sender: str = "guard-0") -> None:
        for line in lines:
            self.folder.add(sender, line)

    def wait(self, seconds: float) -> None:
        self.seconds += seconds
        self.folder.tick()

    @property
    def lines(self) -> list[str]:
        return [line for _, line in self.written]


@pytest.fixture
def log() -> Log:
    return Log()


def test_equal_lines_become_one_and_a_count(log: Log) -> None:
    log.add("out of files", *["out of files"] * 55_000, "something else")
    assert log.lines == ["out of files", "something else"]
    log.wait(WINDOW_SECONDS)
    assert log.lines[2:] == ["[repeated 55000 times more in 10 s] out of files"]
    log.add("out of files")
    log.wait(WINDOW_SECONDS)
    assert log.lines[3:] == ["[repeated once more in 10 s] out of files"]
    log.wait(WINDOW_SECONDS)
    log.add("out of files")
    assert log.lines[4:] == ["out of files"]


def test_equal_tracebacks_become_one_and_a_count(log: Log) -> None:
    for _ in range(1_000):
        log.add("socket.accept() out of system resource", *TRACEBACK)
    assert log.lines == ["socket.accept() out of system resource", *TRACEBACK]
    log.folder.close()
    assert log.lines[5:] == [
        "[repeated 999 times more in 1 s] socket.accept() out of system resource",
        f"[the traceback of 4 lines repeated 999 times more in 1 s] {TRACEBACK[-1]}",
    ]


def test_tracebacks_that_differ_stay_whole(log: Log) -> None:
    other = [*TRACEBACK[:-1], "OSError: [Errno 23] Too many open files in system"]
    log.add(*TRACEBACK, *other, *TRACEBACK)
    assert log.lines == [*TRACEBACK, *other]


def test_what_follows_stands_after_an_incomplete_traceback(log: Log) -> None:
    log.add(*TRACEBACK[:2])
    assert log.lines == []
    log.folder.release()
    log.add("rank 0 failed", sender="-")
    assert log.lines == [*TRACEBACK[:2], "rank 0 failed"]
    log.add(*TRACEBACK[:2])
    log.wait(2)
    log.add(*TRACEBACK[:3])
    log.folder.close()
    assert log.lines.count(TRACEBACK[2]) == 1


def test_a_traceback_without_an_end_is_bounded(log: Log) -> None:
    log.add(TRACEBACK[0], *(f"  frame {number}" for number in range(1_000)))
    assert len(log.lines) > 900


def test_senders_are_kept_apart(log: Log) -> None:
    log.add("ready", sender="0")
    log.add("ready", sender="1")
    log.add(*TRACEBACK[:2], sender="0")
    log.add(*TRACEBACK, sender="1")
    log.add(*TRACEBACK[2:], sender="0")
    assert [line for sender, line in log.written if sender == "0"] == ["ready", *TRACEBACK]
    assert [line for sender, line in log.written if sender == "1"] == ["ready", *TRACEBACK]


def test_lines_that_differ_are_bounded_in_number_and_the_rest_is_counted(log: Log) -> None:
    for second in range(60):
        for number in range(2_000):
            log.add(f"line {number} of second {second}")
        log.wait(1)
    most = BURST_LINES + 60 * LINES_PER_SECOND
    assert most * 0.9 < len(log.lines) <= most * 1.1
    noted = [line for line in log.lines if "lines dropped" in line]
    assert noted
    # A sender that is quiet is not affected.
    log.add("hello", sender="rank 1")
    assert log.lines[-1] == "hello"
    log.folder.close()
    dropped = sum(int(line[1:].split()[0]) for line in log.lines if "lines dropped" in line)
    shown = sum(line.startswith("line ") for line in log.lines)
    assert dropped + shown == 120_000


LINES = st.sampled_from([*TRACEBACK, "a", "b", "  indented", "Traceback (most recent call last):"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), LINES), max_size=200), st.randoms())
def test_every_line_is_written_or_counted(
    lines: list[tuple[str, str]], chance: random.Random
) -> None:
    log = Log()
    for sender, line in lines:
        log.add(line, sender=sender)
        if chance.random() < 0.1:
            log.wait(chance.choice([0.5, 3.0, 11.0]))
    log.folder.close()
    for sender in "xyz":
        given = {line for who, line in lines if who == sender}
        kept = [line for who, line in log.written if who == sender]
        assert given <= set(kept)
        assert sum(not line.startswith("[") for line in kept) <= len(lines)


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can change another's limits")
def test_a_guard_without_files_logs_little_and_its_run_goes_on(toy_k2: Path) -> None:
    """asyncio accepts in a loop that logs a traceback for each connection of the backlog."""
    with supervised("local", 1, model=toy_k2) as run, contextlib.ExitStack() as stack:
        url = run.wait_ready().url
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        guard = run.pid_of("guard-0")
        soft, hard = resource.prlimit(guard, resource.RLIMIT_NOFILE)
        open_files = len(os.listdir(f"/proc/{guard}/fd"))
        resource.prlimit(guard, resource.RLIMIT_NOFILE, (open_files, hard))
        for _ in range(20):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(address, timeout=2))
        time.sleep(4)
        resource.prlimit(guard, resource.RLIMIT_NOFILE, (soft, hard))
        assert run.record.state == "ready", run.record.log_file.read_text()
        assert psutil.pid_exists(guard)
        text = run.record.log_file.read_text()
        run.supervisor.terminate()
        assert run.supervisor.wait(20) == 0
        text = run.record.log_file.read_text()
    assert "Too many open files" in text
    assert "repeated" in text
    assert len(text.splitlines()) < 150, text
