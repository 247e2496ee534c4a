"""Append lines to a file of a run without ever raising: on a full disk, lines are dropped.

The file may grow to a limit. Then it becomes ``NAME.1`` and a new file begins, or, if it has no
second file, further lines are dropped.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from k2cli.files import APPEND, disk_reason, open_regular


class LogFile:
    """A file to which one process appends lines.

    Args:
        path: the file; opened at the first line.
        max_bytes: its largest size.
        note: makes a line of the file of a remark; None for files of data, which get no remarks
            and have no second file.
        on_trouble: called once with a sentence when lines begin to be dropped.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        note: Callable[[str], str] | None,
        on_trouble: Callable[[str], None],
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._note = note
        self._on_trouble = on_trouble
        self._descriptor: int | None = None
        self._size = 0
        self._dropped = 0
        self._said = False

    def write(self, line: str) -> None:
        """Append a line; if that fails, count it, and say so in the file once it can be written."""
        try:
            if self._dropped and self._note is not None:
                remark = f"[lines before this one that could not be written: {self._dropped}]"
                # In one piece: the short remark alone might fit where the line does not.
                self._append(f"{self._note(remark)}\n{line}")
            else:
                self._append(line)
            self._dropped = 0
        except OSError as error:
            self._dropped += 1
            if not self._said:
                self._said = True
                reason = disk_reason(error, self._path)
                self._on_trouble(f"'{self._path}' cannot be written, lines are dropped: {reason}")

    def close(self) -> None:
        """Close the file; a later line would open it again."""
        if self._descriptor is not None:
            with suppress(OSError):  # NFS reports a full disk here
                os.close(self._descriptor)
            self._descriptor = None

    def _append(self, line: str) -> None:
        data = line.encode(errors="replace") + b"\n"
        descriptor = self._open()
        if self._size + len(data) > self._max_bytes:
            descriptor = self._rotate()
        written = 0
        try:
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError:
            if written:  # half a line would spoil the next one
                os.ftruncate(descriptor, self._size)
            raise
        self._size += len(data)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_regular(self._path, APPEND)
            self._size = os.fstat(self._descriptor).st_size
        return self._descriptor

    def _rotate(self) -> int:
        """Start a new file and keep only the last full one."""
        if self._note is None:
            raise OSError(errno.EFBIG, f"it has its largest size, {self._max_bytes} bytes")
        full = self._path.with_name(f"{self._path.name}.1")
        with suppress(FileNotFoundError):  # the user has removed it
            self._path.replace(full)
        self.close()
        descriptor = self._open()
        self._append(self._note(f"[earlier lines are in {full}, still earlier ones are removed]"))
        return descriptor
