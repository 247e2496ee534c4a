"""The end of a run that chats started, once its last chat has left or was killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from k2cli.runs.lease import Lease, take_over

LOOK_SECONDS = 1.0
"""Between two looks at the lease: the run begins to end within two seconds."""

CAUSE = "its last chat has left"


class LeaseWatch:
    """Watch over the chats of a run.

    Args:
        folder: the run's.
        needed: False for a run that does not depend on chats.
        stop: ends the run, with the cause.
        say: logs a line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        needed: bool,
        stop: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._needed = needed
        self._stop = stop
        self._say = say
        self._lease: Lease | None = None

    async def follow(self) -> None:
        """Stop the run when no chat holds the lease any more."""
        said = False
        while self._needed and self._lease is None:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self._lease = take_over(self._folder)
            except OSError as error:  # such as a full disk: nobody can have left a file
                if not said:
                    self._say(f"the lease of the chats cannot be read: {error}")
                said = True
        if self._lease is not None:
            self._stop(CAUSE)
