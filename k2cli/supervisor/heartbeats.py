"""Heartbeats between a supervisor and the leader's guard, so that each notices the other's end.

Both compare times of their event loops, which do not count the pauses of their own process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from k2cli.protocol import Deadlines, Heartbeat

_LOOK_SECONDS = 0.25


class Heartbeats:
    """The heartbeats of one run, from its first attempt to its last.

    Args:
        deadlines: those of the run.
        tell: sends a heartbeat to the guard.
        silent: called with the limit, in seconds, as long as the guard is silent beyond it.
    """

    def __init__(
        self,
        deadlines: Deadlines,
        tell: Callable[[Heartbeat], None],
        silent: Callable[[float], None],
    ) -> None:
        self._deadlines = deadlines
        self._tell = tell
        self._silent = silent
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._heard_at: float | None = None

    def started(self, *, anew: bool) -> None:
        """Restart the deadlines for a new attempt; ``anew``: with a new guard."""
        self._started_at = self._loop.time()
        if anew:
            self._heard_at = None

    def heard(self) -> None:
        """Record a sign of life: any message of the guard."""
        self._heard_at = self._loop.time()

    async def send(self) -> None:
        """Send heartbeats until cancelled."""
        while True:
            self._tell(Heartbeat())
            await asyncio.sleep(self._deadlines.heartbeat_interval)

    async def watch(self) -> None:
        """Call ``silent`` if the guard, which sends a heartbeat a second, misses its deadline."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = self._loop.time()
            if self._heard_at is None:
                limit, since = self._deadlines.initialisation, self._started_at
            else:
                limit, since = self._deadlines.liveness, self._heard_at
            if now - since > limit:
                self._silent(limit)
