"""Ask a run for its status again and again, in a thread, whether it answers or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from k2cli.client.status_document import StatusDocument
from k2cli.errors import K2Error


@dataclass(frozen=True, slots=True)
class Observation:
    """An attempt to read the status, at a moment of the monotonic clock.

    Attributes:
        document: the status, or None if there is none.
        problem: the reason for that.
        bug: an error of k2 itself, after which nothing more is read.
    """

    at: float
    document: StatusDocument | None = None
    problem: str = ""
    bug: Exception | None = None


class StatusClient(Protocol):
    """A connection to a server; ``client.ApiClient`` is one."""

    def status(self) -> StatusDocument:
        """Return the status of the run.

        Raises:
            K2Error: if there is none.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class StatusWatch:
    """Repeated reading of a run's status.

    Args:
        connect: finds the run and connects to it, or raises a ``K2Error``. It is called again after
            each failure, since the run may be another one then.
        interval_seconds: the pause between two questions.
    """

    def __init__(self, connect: Callable[[], StatusClient], interval_seconds: float) -> None:
        self._connect = connect
        self.interval_seconds = interval_seconds
        self._stopped = threading.Event()
        self._client: StatusClient | None = None

    def start(self, notify: Callable[[Observation], None]) -> None:
        """Begin to read in a thread, which calls ``notify`` after each attempt."""
        # A server that sends one byte at a time must not keep the process from ending.
        threading.Thread(target=self._read, args=(notify,), daemon=True).start()

    def stop(self) -> None:
        """End the thread, without waiting for an answer that is under way."""
        self._stopped.set()

    def _read(self, notify: Callable[[Observation], None]) -> None:
        while not self._stopped.is_set():
            observation = self._observe()
            if self._stopped.is_set():
                break
            notify(observation)
            if observation.bug is not None:
                break
            self._stopped.wait(self.interval_seconds)
        self._disconnect()

    def _observe(self) -> Observation:
        try:
            if self._client is None:
                self._client = self._connect()
            return Observation(time.monotonic(), self._client.status())
        except K2Error as error:
            self._disconnect()
            return Observation(time.monotonic(), problem=error.message)
        except Exception as error:
            return Observation(time.monotonic(), bug=error)

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
