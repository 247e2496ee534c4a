"""The signals that stop a run, for the process that supervises it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


def obey_signals(
    stop: Callable[[str], None],
    force: Callable[[], None],
    is_stopping: Callable[[], bool],
    on_interrupt: Callable[[bool], None] | None,
) -> None:
    """Install signal handlers that stop the run.

    SIGTERM and SIGHUP stop it; the first SIGINT too, if ``on_interrupt`` is given. The second
    SIGINT kills its processes. Without ``on_interrupt``, SIGINT is ignored until the run is being
    stopped, and kills its processes then.
    """
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        first = not is_stopping()
        if on_interrupt is not None:
            on_interrupt(first)
        if not first:
            force()
        elif on_interrupt is not None:
            stop("interrupted")

    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, stop, "stopped")
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, stop, "the terminal was closed")
    # A supervisor that Ctrl-Z has stopped would look dead to its guards.
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
