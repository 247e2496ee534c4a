"""Keeping this machine awake during long work: macOS sleeps although a download or run goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_CAFFEINATE = "/usr/bin/caffeinate"
_END_SECONDS = 5.0


class Awake:
    """Keeper of a Mac that would sleep while idle; other systems decide as they are set up to.

    It ends with this process, however that ends.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self, *, wanted: bool) -> None:
        """Keep this machine awake from now on, or no longer. May be called again and again."""
        if sys.platform != "darwin" or wanted == (self._process is not None):
            return
        if wanted:
            self._start()
        else:
            self._end()

    def _start(self) -> None:
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [_CAFFEINATE, "-i", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C at the terminal is not for it.
                start_new_session=True,
            )

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # also ends it if it is stopped: a guard must not wait here
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_END_SECONDS)


@contextlib.contextmanager
def kept_awake() -> Iterator[None]:
    """Keep this machine awake while the block runs."""
    awake = Awake()
    awake.keep(wanted=True)
    try:
        yield
    finally:
        awake.keep(wanted=False)
