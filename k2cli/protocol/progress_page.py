"""The progress page: shared memory in which a rank counts its steps and notes MLX's memory.

The guard reads it from outside, so it sees a rank that hangs, is stopped or holds the GIL just as
well as one that is dead. The page is a file without a name, in memory if the system can do that,
mapped by both processes; its descriptor is inherited by the rank.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal[
    "initialising", "loading", "checking", "warming up", "idle", "busy", "waiting", "ending",
    "computing a new shape",
]  # fmt: skip
"""``waiting``: for the part of another rank in a step. That rank's own guard watches it.

``computing a new shape``: a step with a number of tokens or rows that this rank computes for the
first time, for which kernels may be compiled.
"""

PHASES: tuple[Phase, ...] = get_args(Phase)

_LAYOUT = struct.Struct("=QQQ")
# Added to the number of the phase if the step is joint.
_JOINT = 1 << 8


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps that a rank has completed since its start, and its current phase.

    ``joint``: it computes something to which all ranks contribute (a sum), so it may also be
    waiting for them.
    """

    steps: int
    phase: Phase
    joint: bool = False


class ProgressPage:
    """Counters that one rank writes and its guard reads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _LAYOUT.size)
        self.measure_mlx: Callable[[], int] = lambda: 0
        """Set by a rank once MLX is loaded; ``advance`` notes what it returns."""

    @classmethod
    def create(cls) -> ProgressPage:
        """Make a fresh page (steps 0, initialising) that has no name in the file system."""
        from k2cli.files import nameless_file  # only guards need it

        return cls(nameless_file(bytes(_LAYOUT.size)))

    def fileno(self) -> int:
        """Return the descriptor that the rank must inherit."""
        return self._descriptor

    def read(self) -> Progress:
        """Return steps and phase."""
        steps, phase, _ = _LAYOUT.unpack_from(self._map)
        return Progress(steps, PHASES[phase % _JOINT], joint=phase >= _JOINT)

    def read_mlx_bytes(self) -> int:
        """Return the memory that MLX held at the last step; 0 before MLX was loaded."""
        _, _, mlx_bytes = _LAYOUT.unpack_from(self._map)
        return int(mlx_bytes)

    def advance(self, phase: Phase, *, joint: bool = False) -> None:
        """Count one more step, done in ``phase``."""
        steps, _, _ = _LAYOUT.unpack_from(self._map)
        number = PHASES.index(phase) + (_JOINT if joint else 0)
        _LAYOUT.pack_into(self._map, 0, steps + 1, number, self.measure_mlx())

    def close(self) -> None:
        """Unmap the page. The other process keeps its own mapping."""
        self._map.close()
        os.close(self._descriptor)
