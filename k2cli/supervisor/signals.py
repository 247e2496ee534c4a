"""The signals that stop a run: for its supervisor, and for commands until that has taken over."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


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
    import asyncio  # slow to import; only a supervisor has a loop

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


@contextlib.contextmanager
def interrupted_by_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Let signals that are not ignored end the body as Ctrl-C does, if this is the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
