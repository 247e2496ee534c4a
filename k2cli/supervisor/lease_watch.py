"""The end of a run that is for chats or a check alone, once they have ended or were killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from k2cli.runs.lease import Lease, take_over

LOOK_SECONDS = 1.0
"""Between two looks at the lease: the run begins to end within two seconds."""


class LeaseWatch:
    """Watch over the processes that a run is for.

    Args:
        folder: the run's.
        cause: why the run ends once none of them holds its lease; empty for a run that stays.
        stop: ends the run, with the cause.
        say: logs a line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cause: str,
        stop: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._cause = cause
        self._stop = stop
        self._say = say
        self._lease: Lease | None = None

    async def follow(self) -> None:
        """Stop the run when nobody holds the lease any more."""
        said = False
        while self._cause and self._lease is None:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self._lease = take_over(self._folder)
            except OSError as error:  # such as a full disk: nobody can have left a file
                if not said:
                    self._say(f"the lease of the run cannot be read: {error}")
                said = True
        if self._lease is not None:
            self._stop(self._cause)
