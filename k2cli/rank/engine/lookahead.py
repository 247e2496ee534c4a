"""Whether a run decides steps ahead: lays the next one out while this one is being computed.

One rank and pipelines always gain by it. In tensor parallelism every rank computes all the time,
and MLX's ring waits for its peers by spinning: where a rank has one core, laying out the next step
takes turns with the computing of this one, on every rank at another moment, and all of them wait.
Measured on two ranks tied to a core each, a toy K2 of 7 ms a token: 0.67 of the rate without.

On a GPU there is another limit. MLX writes a token into a KV cache in place only if nothing that is
on its way still reads the cache. Where the program is ahead of the GPU by a whole step, the next
step copies every cache instead: measured on an H100 kept busy, 6.3 GB of copies for caches of
6.0 GB, in every step. A model of many layers is not laid out that far ahead, since MLX lets ten
command buffers wait; one of few layers can be. ``CopyWatch`` notices it.
"""

from __future__ import annotations

import os

import mlx.core as mx

from k2cli.protocol import Assignment
from k2cli.units import MB

CORES_PER_RANK = 2


# Copies up to this size cost less than waiting for the GPU, and are within a plan's slack.
SMALL_CACHE_BYTES = 256 * MB


class CopyWatch:
    """Whether a batch with a large cache may have a step ahead: not where that copies the cache.

    It may as long as no copy has been seen, and either half as large a cache was not copied or
    there is room for one copy.
    """

    def __init__(self, limit_bytes: int) -> None:
        """``limit_bytes`` is what all memory of the device may be; 0 where nothing is copied."""
        self._limit_bytes = limit_bytes
        self._proven_bytes = SMALL_CACHE_BYTES
        self._copies = False

    @property
    def watches(self) -> bool:
        """Whether there is anything to notice here."""
        return self._limit_bytes > 0

    def allows(self, cache_bytes: int, active_bytes: int) -> bool:
        """Whether a step may be laid out ahead, with so much memory in use now."""
        if not self.watches or cache_bytes <= SMALL_CACHE_BYTES:
            return True
        if self._copies:
            return False
        has_room = active_bytes + cache_bytes <= self._limit_bytes
        return has_room or cache_bytes <= 2 * self._proven_bytes

    def observe(self, cache_bytes: int, grown_bytes: int) -> None:
        """Laying a step out ahead took so much memory."""
        if cache_bytes <= SMALL_CACHE_BYTES:
            return  # other arrays of the step may be as large
        if grown_bytes > cache_bytes // 2:
            self._copies = True
        else:
            self._proven_bytes = max(self._proven_bytes, cache_bytes)


def device_limit_bytes() -> int:
    """What MLX's GPU memory may be in all; 0 on the CPU."""
    if mx.default_device() != mx.gpu:
        return 0
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or 0)


def looks_ahead(assignment: Assignment) -> bool:
    """Decide it for this rank's run, on the leader.

    ``assignment.looks_ahead`` overrides what is found.
    """
    if assignment.looks_ahead is not None:
        return assignment.looks_ahead
    if assignment.strategy != "tensor":
        return True
    here = assignment.nodes[assignment.rank]
    return usable_cores() >= CORES_PER_RANK * assignment.nodes.count(here)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
