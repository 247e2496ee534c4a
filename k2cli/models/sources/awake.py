"""Keeping this machine awake during a long download: macOS sleeps although a download runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_CAFFEINATE = "/usr/bin/caffeinate"
_END_SECONDS = 5.0


@contextlib.contextmanager
def kept_awake() -> Iterator[None]:
    """Keep a Mac from sleeping while it is idle; other systems decide as they are set up to.

    The child ends with this process, however that ends.
    """
    if sys.platform != "darwin":
        yield
        return
    command = [_CAFFEINATE, "-i", "-w", str(os.getpid())]
    process: subprocess.Popen[bytes] | None = None
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_END_SECONDS)
