"""Ctrl-C during an answer: the first one stops it, further ones do not disturb the stopping."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for the first Ctrl-C inside, and ignore others until the end."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(slots=True)
class NotedInterrupts:
    """Ctrl-C as a fact: ``came`` is True after the first one."""

    came: bool = False


@contextmanager
def noted_interrupts() -> Iterator[NotedInterrupts]:
    """Note Ctrl-C inside instead of raising, for work that must not stop at any point."""
    noted = NotedInterrupts()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
