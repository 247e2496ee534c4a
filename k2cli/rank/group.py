"""Joins a rank to its MLX group, and refuses a group that is not the one planned."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.protocol import Assignment


def join_group(assignment: Assignment) -> Any | None:
    """The MLX group of a run, or None for a single rank, which needs none.

    Holds the GIL while it waits for its peers: only the guard can end it meanwhile.

    Raises:
        ClusterError: if the transport is missing, or its group has another size or rank.
    """
    if assignment.size == 1:
        return None
    try:
        group = mx.distributed.init(strict=True, backend=assignment.transport)
    except RuntimeError as error:
        raise ClusterError(
            f"the {assignment.transport} back end did not start on "
            f"{assignment.nodes[assignment.rank]}: {error}"
        ) from error
    if (group.rank(), group.size()) != (assignment.rank, assignment.size):
        # MPI without its real library makes every rank a group of its own, without a word.
        raise ClusterError(
            f"{assignment.transport} made this rank {group.rank()} of {group.size()}, "
            f"planned was {assignment.rank} of {assignment.size}"
        )
    return group
