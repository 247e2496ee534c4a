"""MLX set-up of a rank: its memory limits and its group."""

from __future__ import annotations

import errno
import sys
from typing import Any

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.protocol import Assignment
from k2cli.rank.listen_address import bind_only_to


def set_memory_limits(assignment: Assignment) -> None:
    """Apply the plan's limits on wired memory, on MLX's cache of freed arrays, and on both.

    A GPU may keep a step's temporary arrays for the next one: taking gigabytes from the system for
    every layer anew costs time. Before all memory in use and kept would exceed the plan, MLX gives
    kept arrays back.
    """
    if assignment.wired_limit_bytes is not None and mx.metal.is_available():
        mx.set_wired_limit(assignment.wired_limit_bytes)
    if assignment.cache_limit_bytes is not None:
        mx.set_cache_limit(assignment.cache_limit_bytes)
    if assignment.memory_limit_bytes is not None:
        mx.set_memory_limit(assignment.memory_limit_bytes)


def _hint(text: str) -> str | None:
    """Return what to do about an error of MLX; None if that is not known.

    MLX tells the number of a system's error alone. On a Mac this one is also what programs see that
    may not use the local network (Apple's TN3179, canonical/multipass#3766).
    """
    if sys.platform == "darwin" and f"(error: {errno.EHOSTUNREACH})" in text:
        return (
            "no route to host: allow the program that k2 was started from in System Settings, "
            "Privacy & Security, Local Network"
        )
    return None


def join_group(assignment: Assignment) -> Any | None:
    """Join the MLX group of a run; None for a single rank, which needs none.

    Holds the GIL while it waits for the other ranks: only the guard can end it meanwhile.

    Raises:
        ClusterError: if the transport is missing, would listen on every address, or its group has
            another size or rank.
    """
    if assignment.size == 1:
        return None
    if assignment.nccl_coordinator is not None and assignment.rank == 0:
        bind_only_to(assignment.nccl_coordinator.rpartition(":")[0])
    try:
        group = mx.distributed.init(strict=True, backend=assignment.transport)
    except RuntimeError as error:
        raise ClusterError(
            f"the {assignment.transport} transport did not start on "
            f"{assignment.nodes[assignment.rank]}: {error}",
            _hint(str(error)),
        ) from error
    if (group.rank(), group.size()) != (assignment.rank, assignment.size):
        # MPI without its real library silently makes every rank a group of its own.
        raise ClusterError(
            f"{assignment.transport} made this rank {group.rank()} of {group.size()}, "
            f"planned was {assignment.rank} of {assignment.size}"
        )
    return group
