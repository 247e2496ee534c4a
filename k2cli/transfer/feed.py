"""A source whose files come one by one while they are sent on: a model that is being downloaded."""

from __future__ import annotations

import threading
from collections.abc import Callable

OnFile = Callable[[str | None], None]
"""Receives the name of each file that the source has by now, and None when it has all of them."""

Feed = Callable[[Callable[[str], None]], None]
"""Function that makes the source's files, and calls its argument with the name of each."""


class GrowingSource:
    """Runs a feed in a thread, and tells each attempt which files are there."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._ended = False
        self._error: BaseException | None = None
        self._follower: OnFile = lambda name: None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def follow(self, on_file: OnFile) -> None:
        """Tell an attempt what is there, and from now on what comes; begins at the first call."""
        with self._lock:
            for name in self._names:
                on_file(name)
            if self._ended:
                on_file(None)
            self._follower = on_file
            if self._thread.ident is None:
                self._thread.start()

    def _run(self) -> None:
        try:
            self._feed(self._add)
        except BaseException as error:  # raised again by ``check``, in the thread of the push
            self._error = error
        with self._lock:
            self._ended = True
            self._follower(None)

    def _add(self, name: str) -> None:
        with self._lock:
            self._names.append(name)
            self._follower(name)

    def check(self) -> None:
        """Raise the error that ended the feed, if one did."""
        if self._error is not None:
            raise self._error

    @property
    def has_failed(self) -> bool:
        """True if an error ended the feed."""
        return self._error is not None
