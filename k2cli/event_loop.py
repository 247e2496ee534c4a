"""An event loop of asyncio whose time stands still while this process does not run.

All timeouts, sleeps and delayed calls of asyncio use the loop's time, so each of them discounts the
pauses of this process. See ``pauses``; this is a separate file because importing asyncio takes time
that a rank does not need to spend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from k2cli.pauses import INTERVAL_SECONDS, PauseAwareClock

_T = TypeVar("_T")


class PauseAwareEventLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop for Unix with a ``PauseAwareClock``."""

    def __init__(self) -> None:
        self._pause_aware_clock = PauseAwareClock()
        super().__init__()
        self._tick()

    def time(self) -> float:
        """Return the seconds of the loop's clock."""
        return self._pause_aware_clock.now()

    def _tick(self) -> None:
        """Wake up regularly, so that a long wait for input is not taken for a pause."""
        self.call_later(INTERVAL_SECONDS, self._tick)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine like ``asyncio.run``, in a loop whose timeouts discount pauses."""
    with asyncio.Runner(loop_factory=PauseAwareEventLoop) as runner:
        return runner.run(main)
