"""A line on stderr about work that takes longer than a user expects."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from k2cli.ui.output import note
from k2cli.units import format_duration

_FIRST_SECONDS = 2.0
_NEXT_SECONDS = 10.0


@contextlib.contextmanager
def told_if_slow(text: str) -> Iterator[None]:
    """Say what is being done, such as ``reading the models``, after 2 s and then every 10 s."""
    ended = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        if ended.wait(_FIRST_SECONDS):
            return
        note(f"{text} ...")
        while not ended.wait(_NEXT_SECONDS):
            note(f"{text}, for {format_duration(time.monotonic() - began)} now ...")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
