"""Limit of the bytes per second of all streams of a transfer together."""

from __future__ import annotations

import threading
import time


class RateLimit:
    """Bucket of bytes that fills at a constant rate, up to the bytes of one second."""

    def __init__(self, bytes_per_second: int | None) -> None:
        """Make a limit; None limits nothing."""
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    @property
    def is_set(self) -> bool:
        """True if there is a limit."""
        return self._rate is not None

    def take(self, count: int) -> float:
        """Take bytes, and return the seconds to wait before the next ones are read."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            # Time in which nothing was read gives at most a tenth of a second of credit.
            self._free_at = max(self._free_at, now - 0.1) + count / self._rate
            return max(0.0, self._free_at - now)
