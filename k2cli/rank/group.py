"""MLX set-up of a rank: its memory limits and its group."""

from __future__ import annotations

import errno
import sys
from typing import Any

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.protocol import Assignment
from k2cli.rank.listen_address import bind_only_to
from k2cli.units import MIB, format_bytes

_ROUNDING_BYTES = 64 * MIB
"""Memory of small arrays beyond their bytes: a page of 16 KiB each."""

_JACCL_HINTS = {
    "protection domain": "restart the machine, whose RDMA is used up, unless its port is down: "
    "ssh {node} ibv_devinfo; ssh -t {node} sudo shutdown -r now",
    "IPv4-mapped GID": "k2 doctor CLUSTER, which names the port and the command",
    "to RTR failed with errno 22": "k2 doctor CLUSTER: a port without IPv4, or in a bridge",
    "to RTR failed with errno 60": "k2 cluster refresh CLUSTER, then k2 doctor CLUSTER: a cable "
    "leads elsewhere, or a port has another address",
}
"""Errors of MLX's JACCL at its start (rdma.cpp), and what has helped: ml-explore/mlx#3207, #3467,
#4530."""


def set_memory_limits(assignment: Assignment) -> None:
    """Apply the plan's limits on MLX's cache of freed arrays, and on all memory; wire weights.

    A GPU may keep a step's temporary arrays for the next one: taking gigabytes from the system for
    every layer anew costs time. Before all memory in use and kept would exceed the plan, MLX gives
    kept arrays back.

    Raises:
        ClusterError: if Metal's limit is now less than the plan needs.
    """
    if assignment.wired_limit_bytes is not None and mx.metal.is_available():
        allowed = _allowed_bytes(assignment, assignment.wired_limit_bytes)
        mx.set_wired_limit(min(assignment.expected_weights_bytes[assignment.rank], allowed))
    if assignment.cache_limit_bytes is not None:
        mx.set_cache_limit(assignment.cache_limit_bytes)
    if assignment.memory_limit_bytes is not None:
        mx.set_memory_limit(assignment.memory_limit_bytes)


def wire_weights(assignment: Assignment) -> None:
    """Keep the loaded weights wired on a Mac, and as little else as possible.

    Weights that are not wired are paged: ollama/ollama#17367 measured 0.6 against 64 tokens/s, with
    the weights alone wired. What comes and goes stays outside: macOS has panicked while MLX added
    such memory to wired memory and removed it (ml-explore/mlx#3186), and each time takes time
    (mlx#1911).
    """
    if assignment.wired_limit_bytes is not None and mx.metal.is_available():
        allowed = _allowed_bytes(assignment, assignment.wired_limit_bytes)
        # MLX adds what was left out so far: weights that came while others were being computed.
        mx.set_wired_limit(min(mx.get_active_memory() + _ROUNDING_BYTES, allowed))


def _allowed_bytes(assignment: Assignment, planned_bytes: int) -> int:
    """Return the planned limit, or Metal's own if that is less: MLX refuses any above it.

    It may have become less since the plan was made: ``iogpu.wired_limit_mb`` holds until a machine
    restarts, and ``--restart on-failure`` starts ranks after that too.
    """
    allowed = int(mx.device_info()["max_recommended_working_set_size"])
    needed = assignment.memory_limit_bytes or sum(
        each[assignment.rank]
        for each in (assignment.expected_weights_bytes, assignment.expected_cache_bytes)
        if each
    )
    if needed > allowed:
        node = assignment.nodes[assignment.rank]
        wanted = -(-planned_bytes * assignment.nodes.count(node) // MIB)
        raise ClusterError(
            f"Metal allows {format_bytes(allowed)} on {node} now, and the plan needs "
            f"{format_bytes(needed)} of the {format_bytes(planned_bytes)} that it allowed before",
            f"on {node}: sudo sysctl iogpu.wired_limit_mb={wanted}  (holds until it restarts; "
            "for good: docs/guide/doctor.md)",
        )
    return min(planned_bytes, allowed)


def _hint_of_macos(text: str) -> str | None:
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
    except (RuntimeError, ValueError) as error:  # JACCL's "Changing queue pair" is a ValueError
        node = assignment.nodes[assignment.rank]
        hints = (hint for phrase, hint in _JACCL_HINTS.items() if phrase in str(error))
        raise ClusterError(
            f"the {assignment.transport} transport did not start on {node}: {error}",
            next((hint.format(node=node) for hint in hints), _hint_of_macos(str(error))),
        ) from error
    if (group.rank(), group.size()) != (assignment.rank, assignment.size):
        # MPI without its real library silently makes every rank a group of its own.
        raise ClusterError(
            f"{assignment.transport} made this rank {group.rank()} of {group.size()}, "
            f"planned was {assignment.rank} of {assignment.size}"
        )
    return group
