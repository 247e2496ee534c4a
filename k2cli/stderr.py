"""Messages of k2's own processes on stderr: supervisors, guards, agents and MPI's slots.

Their stderr may be a file on a full disk, a pipe that nobody reads, or a terminal. A message that
cannot be written is lost, and never the cause of another error.
"""

from __future__ import annotations

import contextlib
import os

from k2cli.units import clean_text


def say_on_stderr(text: str) -> None:
    """Write one message, without control characters."""
    data = (clean_text(text) + "\n").encode(errors="replace")
    with contextlib.suppress(OSError):
        # Past Python's buffer, which would try to write the message again at exit.
        os.write(2, data)
