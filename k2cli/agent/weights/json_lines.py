"""Lines of JSON over standard input and output, for the processes of a transfer.

Bytes after a line may be data, so lines are read without reading ahead of what has been taken.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import Any

import msgspec

from k2cli.agent.weights.messages import MAX_LINE_BYTES
from k2cli.files import decode_json

_READ_BYTES = 2**16


class Input:
    """Standard input of a process: lines, and between them data.

    Args:
        quiet_seconds: the longest time without a byte; None for no limit. If the network is cut,
            a process on the far side of ssh is not told.
        descriptor: of the input.
    """

    def __init__(self, quiet_seconds: float | None = None, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._quiet_seconds = quiet_seconds
        self._left = b""

    def line(self) -> bytes | None:
        """Return the next line; None at the end of the input.

        Raises:
            ValueError: if it is too long.
            TimeoutError: if nothing comes.
        """
        parts: list[bytes] = []
        length = 0
        while True:
            if not self._left:
                self._wait()
            piece = self._left or os.read(self._descriptor, _READ_BYTES)
            self._left = b""
            if not piece:
                return None
            before, newline, after = piece.partition(b"\n")
            parts.append(before)
            length += len(before)
            if length > MAX_LINE_BYTES:
                raise ValueError("a line is too long")
            if newline:
                self._left = after
                return b"".join(parts)

    def read(self, buffer: memoryview) -> int:
        """Fill a buffer as far as data are there; return 0 at the end of the input.

        Raises:
            TimeoutError: if nothing comes.
        """
        if self._left:
            count = min(len(buffer), len(self._left))
            buffer[:count] = self._left[:count]
            self._left = self._left[count:]
            return count
        self._wait()
        return os.readv(self._descriptor, [buffer])

    def _wait(self) -> None:
        if self._quiet_seconds is None:
            return
        ready, _, _ = select.select([self._descriptor], [], [], self._quiet_seconds)
        if not ready:
            raise TimeoutError("nothing was heard of the launcher")


class Output:
    """Standard output, or another descriptor, of a process: one event a line, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: Any) -> None:
        """Write an event; nobody may be left to read it."""
        data = msgspec.json.encode(event) + b"\n"
        with self._lock, contextlib.suppress(OSError):
            write_all(self._descriptor, data)


def write_all(descriptor: int, data: memoryview | bytes) -> None:
    """Write all bytes to a descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def decode_line(line: bytes, kind: Any) -> Any:
    """Decode a line as a message.

    Raises:
        msgspec.DecodeError: if it is none of that kind.
    """
    return decode_json(line, type=kind)
