"""Remove the remains of ended runs from the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2cli.agent.clean import Cleaning, Cleared
from k2cli.errors import ClusterError
from k2cli.nodes.node import Node
from k2cli.nodes.parallel import map_in_parallel
from k2cli.runs.record import RunRecord, list_runs


@dataclass(frozen=True, slots=True)
class CleanReport:
    """The result on one node. ``problem`` is the reason why it could not be asked, or empty."""

    node: str
    cleared: tuple[Cleared, ...] = ()
    spared: tuple[str, ...] = ()
    problem: str = ""


def clean(nodes: Sequence[Node]) -> list[CleanReport]:
    """Remove the remains of ended runs from all nodes at the same time; spare live runs.

    A run that was launched here is live if its supervisor is; any other, if it has shown a sign of
    life on the node within the last minute.
    """
    records = list_runs()
    known = list({node.name: node for node in nodes}.values())
    return map_in_parallel(lambda node: _clean(node, records), known)


def _clean(node: Node, records: Sequence[RunRecord]) -> CleanReport:
    live = ",".join(record.run_id for record in records if record.live)
    gone = ",".join(r.run_id for r in records if not r.live and node.name in r.nodes)
    try:
        found: Cleaning = node.ask(Cleaning, "clean", live, gone)
    except ClusterError as error:
        return CleanReport(node.name, problem=error.message)
    return CleanReport(node.name, found.cleared, found.spared)
