"""What the signals of a supervisor's process mean for its run."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2cli.supervisor.supervisor import Supervisor


def obey_signals(supervisor: Supervisor, on_interrupt: Callable[[bool], None] | None) -> None:
    """Have this process's signals stop the run, from within its event loop.

    SIGTERM and SIGHUP stop it in good order. So does the first SIGINT, if ``on_interrupt`` is
    given; the second SIGINT does not wait.

    Args:
        supervisor: of the run.
        on_interrupt: called at each SIGINT, with whether it is the first. None ignores SIGINT
            until the run is being stopped, and does not wait any longer then.
    """
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        first = not supervisor.stopping
        if on_interrupt is not None:
            on_interrupt(first)
        if first:
            supervisor.stop("interrupted")
        else:
            supervisor.force()

    def insist() -> None:
        if supervisor.stopping:
            supervisor.force()

    loop.add_signal_handler(signal.SIGINT, interrupted if on_interrupt is not None else insist)
    loop.add_signal_handler(signal.SIGTERM, supervisor.stop, "stopped")
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, supervisor.stop, "the terminal was closed")
    # Ctrl-Z would look like a launcher that died.
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
