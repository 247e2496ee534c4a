"""A source whose files come one by one while they are sent on: a model that is being downloaded."""

from __future__ import annotations

import threading
from collections.abc import Callable

OnFile = Callable[[str | None], None]
"""Receives the name of each file that is there by now."""

Feed = Callable[[OnFile], None]
"""Function that makes the source's files. It calls its argument with the name of each, and with
None from time to time: the call raises an exception if the work is to end."""

_END_SECONDS = 15.0


class FeedStopped(Exception):
    """Nobody wants the files any more."""


class GrowingSource:
    """Runs a feed in a thread, and tells each attempt which files are there."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._lock = threading.Lock()
        self._names: dict[str, None] = {}
        self._ended = False
        self._stopped = False
        self._error: BaseException | None = None
        self._follower: OnFile = lambda name: None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def follow(self, on_file: OnFile) -> None:
        """Tell an attempt what is there, and from now on what comes; the first call begins.

        The attempt is told None when all files are there.
        """
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

    def _add(self, name: str | None) -> None:
        if self._stopped:
            raise FeedStopped
        with self._lock:
            if name is not None and name not in self._names:
                self._names[name] = None
                self._follower(name)

    def check(self) -> None:
        """Raise the error that ended the feed, if one did."""
        if self._error is not None and not isinstance(self._error, FeedStopped):
            raise self._error

    def wait(self) -> None:
        """Wait until all files are there, and raise the error if one ended the feed."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()
        self._thread.join()
        self.check()

    def stop(self) -> None:
        """End the feed and wait for it, so that what has arrived is recorded."""
        self._stopped = True
        if self._thread.ident is not None:
            self._thread.join(_END_SECONDS)
