"""Whether a run decides steps ahead: lays the next one out while this one is being computed.

One rank and pipelines always gain by it. In tensor parallelism every rank computes all the time,
and MLX's ring waits for its peers by spinning: where a rank has one core, laying out the next step
takes turns with the computing of this one, on every rank at another moment, and all of them wait.
Measured on two ranks tied to a core each, a toy K2 of 7 ms a token: 0.67 of the rate without.
"""

from __future__ import annotations

import os

from k2cli.runtime.protocol import Assignment

CORES_PER_RANK = 2


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
