"""The part of the doctor that runs before a launch: seconds, no measurement."""

from __future__ import annotations

from collections.abc import Sequence

from k2cli.cluster.doctor.examination import Wishes, examine_nodes
from k2cli.cluster.doctor.results import CheckResult
from k2cli.cluster.nodes import Node
from k2cli.planning.plan import Plan


def quick_checks(
    nodes: Sequence[Node], plan: Plan | None = None, backend: str = "auto"
) -> list[CheckResult]:
    """Check nodes before a launch: access, versions, memory, GPU limit, disk, RDMA, mpirun.

    Args:
        nodes: of the ranks; a node that repeats is checked once.
        plan: what is to be launched, if it is known already.
        backend: the one that will be used; what it needs is then a failure and not a warning.

    Returns:
        Results in the doctor's order. Whoever launches refuses where one has ``fail``.
    """
    distinct = list({node.name: node for node in nodes}.values())
    return list(examine_nodes(distinct, Wishes(quick=True, backend=backend, plan=plan)).results)
