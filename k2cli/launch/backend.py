"""Check the nodes of a launch with the doctor's quick checks, and choose the transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2cli.agent.openmpi import find_mpirun, find_openmpi
from k2cli.choices import Transport, WantedTransport
from k2cli.errors import ClusterError
from k2cli.launch.guard_commands import choose_transport
from k2cli.nodes.node import Node


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport of a run, and the reason for it."""

    transport: Transport
    reason: str


def check_nodes(
    nodes: Sequence[Node], wanted: WantedTransport, say: Callable[[str], None], *, force: bool
) -> Choice:
    """Check the nodes of a launch and choose its transport.

    Launches on this machine alone are not examined: the plan looks at its memory, and nothing
    else of what the doctor looks at stands in their way.

    Raises:
        UsageError: if the transport wanted cannot be had for that many ranks.
        ClusterError: if a check fails and ``force`` is not set; other findings are said.
    """
    basic = choose_transport(wanted, nodes)
    if all(node.is_local for node in nodes):
        choice = Choice(basic, _local_reason(wanted, basic))
    else:
        choice = _examined(nodes, wanted, basic, say, force=force)
    if choice.transport == "mpi":
        find_openmpi()
    return choice


def _local_reason(wanted: WantedTransport, transport: Transport) -> str:
    if transport == "local":
        return "one rank needs no back end"
    if wanted != "auto":
        return "asked for"
    return "mpirun is here" if transport == "mpi" else "there is no mpirun"


def _examined(
    nodes: Sequence[Node],
    wanted: WantedTransport,
    basic: Transport,
    say: Callable[[str], None],
    *,
    force: bool,
) -> Choice:
    from k2cli.doctor.examination import ExaminationOptions, examine_nodes

    distinct = list({node.name: node for node in nodes}.values())
    report = examine_nodes(distinct, ExaminationOptions(quick=True, transport=wanted))
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
    return Choice(choose_transport(advice.backend, nodes), advice.reason)
