"""Whether nodes are fit for a launch, by the doctor's quick checks, and the best back end there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2cli.cluster.launchers import Backend, choose_backend
from k2cli.cluster.nodes import Node
from k2cli.cluster.openmpi import find_mpirun, find_openmpi
from k2cli.errors import ClusterError


@dataclass(frozen=True, slots=True)
class Choice:
    """The back end of a run, and why it is that one."""

    backend: Backend
    reason: str


def check_nodes(
    nodes: Sequence[Node], wanted: str, say: Callable[[str], None], *, force: bool
) -> Choice:
    """Check the nodes of a launch and choose its back end.

    Launches on this machine alone are not examined: the plan looks at its memory, and nothing
    else of what the doctor looks at stands in their way.

    Raises:
        UsageError: if the back end wanted cannot be had for that many ranks.
        ClusterError: if a check fails and ``force`` is not set; other findings are said.
    """
    basic = choose_backend(wanted, nodes)
    if all(node.is_local for node in nodes):
        choice = Choice(basic, _local_reason(wanted, basic))
    else:
        choice = _examined(nodes, wanted, basic, say, force=force)
    if choice.backend == "mpi":
        find_openmpi()
    return choice


def _local_reason(wanted: str, backend: Backend) -> str:
    if backend == "local":
        return "one rank needs no back end"
    if wanted != "auto":
        return "asked for"
    return "mpirun is here" if backend == "mpi" else "there is no mpirun"


def _examined(
    nodes: Sequence[Node], wanted: str, basic: Backend, say: Callable[[str], None], *, force: bool
) -> Choice:
    from k2cli.cluster.doctor.examination import Wishes, examine_nodes

    distinct = list({node.name: node for node in nodes}.values())
    report = examine_nodes(distinct, Wishes(quick=True, backend=wanted))
    for result in report.results:
        if result.name == "mpirun":
            continue  # about the one on each node's PATH; a launch looks for its own there
        where = f" on {result.node}" if result.node else ""
        text = f"{result.name}{where}: {result.detail}"
        if result.status == "fail" and not force:
            raise ClusterError(text, result.hint)
        if result.status in ("fail", "warn"):
            say(f"warning: {text}" + (f" ({result.hint})" if result.hint else ""))
    if basic == "local":
        return Choice(basic, _local_reason(wanted, basic))
    if wanted != "auto":
        return Choice(basic, "asked for")
    advice = report.recommendation
    if advice is None or advice.backend not in ("mpi", "ring", "jaccl"):
        return Choice(basic, _local_reason(wanted, basic))
    if advice.backend == "mpi" and find_mpirun() is None:
        return Choice("ring", "the nodes have Open MPI, but there is no mpirun on this machine")
    return Choice(choose_backend(advice.backend, nodes), advice.reason)
