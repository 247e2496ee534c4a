"""The progress page: sixteen bytes of shared memory in which a rank counts its steps.

The guard reads it from outside, so it sees a rank that hangs, is stopped or holds the GIL just as
well as one that is dead. The page is an unlinked temporary file mapped by both processes; its
descriptor is inherited by the rank.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal[
    "initialising", "loading", "checking", "warming up", "idle", "busy", "waiting", "ending"
]
"""``waiting`` is for another rank's part of a step; that rank's own guard watches it."""

PHASES: tuple[Phase, ...] = get_args(Phase)

_LAYOUT = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a rank has done: steps since its start, and what it is doing now."""

    steps: int
    phase: Phase


class ProgressPage:
    """Written by one rank, read by its guard."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _LAYOUT.size)

    @classmethod
    def create(cls) -> ProgressPage:
        """A fresh page (steps 0, initialising) that no name in the file system leads to."""
        import tempfile  # for guards only: a rank need not wait for it

        with tempfile.TemporaryFile() as file:
            file.truncate(_LAYOUT.size)
            return cls(os.dup(file.fileno()))

    def fileno(self) -> int:
        """The descriptor that the rank must inherit."""
        return self._descriptor

    def read(self) -> Progress:
        """The current counters."""
        steps, phase = _LAYOUT.unpack_from(self._map)
        return Progress(steps, PHASES[phase])

    def write(self, progress: Progress) -> None:
        """Replace the counters."""
        _LAYOUT.pack_into(self._map, 0, progress.steps, PHASES.index(progress.phase))

    def advance(self, phase: Phase) -> None:
        """Count one step more, done in ``phase``."""
        steps, _ = _LAYOUT.unpack_from(self._map)
        _LAYOUT.pack_into(self._map, 0, steps + 1, PHASES.index(phase))

    def close(self) -> None:
        """Unmap the page; the other process keeps its own mapping."""
        self._map.close()
        os.close(self._descriptor)
