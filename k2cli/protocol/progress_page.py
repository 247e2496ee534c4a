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

_LAYOUT = struct.Struct("=QQQQQ")
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


@dataclass(frozen=True, slots=True)
class MlxMemory:
    """Memory of MLX in one process, in bytes; all 0 before MLX was loaded.

    ``active_bytes`` is held by arrays, ``cached_bytes`` by freed arrays that MLX keeps for new
    ones, and ``peak_bytes`` is the most that arrays have held since the process began.
    """

    active_bytes: int = 0
    cached_bytes: int = 0
    peak_bytes: int = 0


class ProgressPage:
    """Counters that one rank writes and its guard reads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _LAYOUT.size)
        self.measure_mlx: Callable[[], MlxMemory] = MlxMemory
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
        steps, phase, *_ = _LAYOUT.unpack_from(self._map)
        return Progress(steps, PHASES[phase % _JOINT], joint=phase >= _JOINT)

    def read_mlx(self) -> MlxMemory:
        """Return the memory of MLX at the last step."""
        _, _, active, cached, peak = _LAYOUT.unpack_from(self._map)
        return MlxMemory(active, cached, peak)

    def advance(self, phase: Phase, *, joint: bool = False) -> None:
        """Count one more step, done in ``phase``."""
        steps, *_ = _LAYOUT.unpack_from(self._map)
        number = PHASES.index(phase) + (_JOINT if joint else 0)
        mlx = self.measure_mlx()
        _LAYOUT.pack_into(
            self._map, 0, steps + 1, number, mlx.active_bytes, mlx.cached_bytes, mlx.peak_bytes
        )

    def close(self) -> None:
        """Unmap the page. The other process keeps its own mapping."""
        self._map.close()
        os.close(self._descriptor)
