"""The named keys of a run, read from the user's file again whenever it changes.

The supervisor runs on the machine with the file, and its connection to the leader's guard reaches
another machine as well as this one, so that no other way to a run is needed to revoke a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from k2cli.access.key_file import Stamp, key_file_stamp, read_keys
from k2cli.access.keys import KeyChoice, chosen
from k2cli.errors import K2Error
from k2cli.protocol import NamedKey, NamedKeys

LOOK_SECONDS = 1.0
"""Between two looks at the file: a revoked key is to have no effect after 5 s."""


class KeyWatch:
    """The named keys that a run accepts at the moment.

    Args:
        choice: which of the user's keys these are.
        tell: sends a message to the leader's guard.
        say: logs a line.
    """

    def __init__(
        self,
        choice: KeyChoice,
        tell: Callable[[NamedKeys], None],
        say: Callable[[str], None],
    ) -> None:
        self.keys: list[NamedKey] = []
        """The keys when the file was last read."""
        self._choice = choice
        self._tell = tell
        self._say = say
        self._stamp: Stamp = None
        self._was_read = False

    @property
    def needed(self) -> bool:
        """True if the run accepts named keys."""
        return self._choice != "none"

    def read(self) -> None:
        """Read the file for the first time; do nothing later.

        Raises:
            K2Error: if the file cannot be used.
        """
        if self.needed and not self._was_read:
            self._stamp = _stamp()
            self.keys = chosen(read_keys(), self._choice)
            self._was_read = True

    def tell(self) -> None:
        """Send the keys to the leader's guard, which may have been started with older ones."""
        if self.needed:
            self._tell(NamedKeys(self.keys))

    async def follow(self) -> None:
        """Send the keys whenever they change, until cancelled.

        A file that cannot be used leaves the keys as they are: it says nothing about any of them. A
        file that is gone has no keys.
        """
        while self.needed:
            await asyncio.sleep(LOOK_SECONDS)
            stamp = await asyncio.to_thread(_stamp)
            if stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                keys = chosen(await asyncio.to_thread(read_keys), self._choice)
            except K2Error as error:
                self._say(f"the named keys stay as they were: {error.message}; {error.hint}")
                continue
            if keys != self.keys:
                names = ", ".join(key.name for key in keys) or "none"
                self._say(f"named keys that are accepted from now on: {names}")
                self.keys = keys
                self.tell()


def _stamp() -> Stamp:
    try:
        return key_file_stamp()
    except OSError:
        return ()  # reading it will say why
