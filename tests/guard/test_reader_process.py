"""The process that reads requests, when its guard ends."""

from __future__ import annotations

import os
import subprocess
import sys

from k2cli.protocol.wire import frame
from k2cli.server.reader_messages import ReaderSettings


def test_a_reader_whose_guard_ends_before_it_can_answer_ends_without_a_traceback() -> None:
    """The end of its answers may be seen before the end of its input."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "k2cli.guard.reader_process"],
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    os.close(reading)
    assert process.stdin is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(frame(ReaderSettings("/nowhere", "demo", 8, 1.0, 1.0, 0)))
        process.stdin.flush()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0
