"""Finds and ends what runs that are gone have left on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from k2cli.cluster.cleaning_here import Cleaning, Cleared
from k2cli.cluster.nodes import Node
from k2cli.cluster.runs import list_runs
from k2cli.errors import ClusterError

_NODES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class CleanReport:
    """One node. ``problem`` is why it could not be asked; empty if it could."""

    node: str
    cleared: tuple[Cleared, ...] = ()
    spared: tuple[str, ...] = ()
    problem: str = ""


def clean(nodes: Sequence[Node]) -> list[CleanReport]:
    """Clear all nodes at once, each once; runs that live are spared.

    A run lives if its supervisor does, for runs launched here; else if it has shown a sign of life
    on the node within the last minute.
    """
    live = ",".join(record.run_id for record in list_runs() if record.live)
    known = list({node.name: node for node in nodes}.values())
    with ThreadPoolExecutor(_NODES_AT_ONCE) as pool:
        return list(pool.map(lambda node: _clean(node, live), known))


def _clean(node: Node, live: str) -> CleanReport:
    try:
        found: Cleaning = node.ask(Cleaning, "clean", live)
    except ClusterError as error:
        return CleanReport(node.name, problem=error.message)
    return CleanReport(node.name, found.cleared, found.spared)
