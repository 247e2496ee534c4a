"""Examination of a cluster: probes of all nodes at once, measurements, and the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from k2cli.agent.software import software as own_software
from k2cli.choices import LinkTransport, WantedTransport
from k2cli.cluster.description import Link
from k2cli.cluster.facts.probes import RawProbes, collect
from k2cli.cluster.facts.reading import examine
from k2cli.cluster.links import detect_links
from k2cli.cluster.measure import measure_disks, measure_links, measure_reach
from k2cli.doctor.advice import (
    Recommendation,
    Setting,
    recommended_settings,
    recommended_transport,
)
from k2cli.doctor.registry import run_checks
from k2cli.doctor.results import CheckResult, Need, Situation
from k2cli.nodes.node import LOCALHOST, Node
from k2cli.nodes.parallel import map_in_parallel
from k2cli.planning.plan import Plan
from k2cli.runs.record import list_runs

SCHEMA_VERSION = 1

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExaminationOptions:
    """Extent of an examination. ``transport`` is the one that a run would use, or ``auto``.

    ``model_folder`` is a checkpoint or a folder of models on the nodes; None is k2's own.
    """

    quick: bool = False
    transport: WantedTransport = "auto"
    model_folder: str | None = None
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of an examination, and the ``probes`` for a recording."""

    situation: Situation
    results: tuple[CheckResult, ...]
    links: tuple[Link, ...]
    recommendation: Recommendation | None
    settings: tuple[Setting, ...]
    probes: tuple[RawProbes, ...] = ()
    quick: bool = False

    @property
    def failed(self) -> bool:
        """True if any check failed."""
        return any(result.status == "fail" for result in self.results)


def examine_nodes(
    nodes: Sequence[Node], options: ExaminationOptions, tell: Tell = lambda _: None
) -> Report:
    """Examine nodes; a node that cannot be reached is a result, not an error.

    Args:
        nodes: the nodes, without repetition.
        options: the extent of the examination.
        tell: called with a line at each step that takes some time.
    """
    tell(f"asking {len(nodes)} node(s)")
    probes = collect_all(nodes, quick=options.quick, model_folder=options.model_folder)
    situation = situation_of(probes, _needs(nodes, options.plan), options.transport)
    situation = _with_own_state(situation)
    links = detect_links(situation.machines)
    if not options.quick:
        situation = _measured(situation, nodes, links, options, tell)
    return report_on(situation, links, probes, quick=options.quick)


def report_on(
    situation: Situation,
    links: tuple[Link, ...],
    probes: Sequence[RawProbes],
    *,
    quick: bool,
) -> Report:
    """Run the checks over a situation and add the recommendations."""
    results = tuple(run_checks(situation, quick=quick))
    readable = len(situation.machines) == len(situation.nodes)
    chosen = recommended_transport(situation, links) if readable else None
    transport = (
        situation.transport if situation.transport != "auto" or not chosen else chosen.backend
    )
    settings = recommended_settings(situation, transport, links) if chosen else ()
    return Report(situation, results, links, chosen, settings, tuple(probes), quick)


def collect_all(
    nodes: Sequence[Node], *, quick: bool = False, model_folder: str | None = None
) -> list[RawProbes]:
    """Probe all nodes at once."""
    return map_in_parallel(
        lambda node: collect(node, quick=quick, model_folder=model_folder), nodes
    )


def situation_of(
    probes: Sequence[RawProbes], needs: Mapping[str, Need], transport: WantedTransport = "auto"
) -> Situation:
    """Make a situation from probes, without measurements."""
    return Situation(tuple(examine(raw) for raw in probes), needs=needs, transport=transport)


def _with_own_state(situation: Situation) -> Situation:
    """Add what only the launching machine knows: its own software and its records of runs."""
    reference = situation.software.get(LOCALHOST) or own_software()
    records = list_runs()
    live = frozenset(record.run_id for record in records if record.live)
    ended = frozenset(record.run_id for record in records) - live
    return replace(situation, reference=reference, live_runs=live, ended_runs=ended)


def _needs(nodes: Sequence[Node], plan: Plan | None) -> dict[str, Need]:
    return needs_of(plan, [node.name for node in nodes]) if plan is not None else {}


def needs_of(plan: Plan, names: Sequence[str]) -> dict[str, Need]:
    """Compute the memory that a plan needs on each node.

    Args:
        plan: its ranks are assigned to nodes by name, or else in the order of the nodes.
        names: names of the nodes.
    """
    by_name = all(budget.name in names for budget in plan.nodes)
    needs: dict[str, Need] = {}
    for index, budget in enumerate(plan.nodes):
        name = budget.name if by_name else names[index % len(names)]
        before = needs.get(name, Need(0, 0))
        needs[name] = Need(
            before.total_bytes + budget.total_bytes,
            before.weights_bytes + budget.weights_bytes,
            (*before.ranks_bytes, budget.total_bytes),
        )
    return needs


# --- measuring ----------------------------------------------------------------------------------


def _measured(
    situation: Situation,
    nodes: Sequence[Node],
    links: tuple[Link, ...],
    options: ExaminationOptions,
    tell: Tell,
) -> Situation:
    """Add measurements of the nodes on which k2 answers."""
    able = [node for node in nodes if node.name in situation.software]
    folders = _model_folders(situation, options.model_folder)
    tell("reading from the models' volumes")
    situation = replace(situation, disks=measure_disks(able, folders))
    if len(able) < 2:
        return situation
    tell("trying every address from every node")
    machines = {node.name: situation.machines[node.name] for node in able}
    situation = replace(situation, reaches=measure_reach(able, machines, links))
    chosen = _links_to_measure(situation, links)
    transport = _transport_to_measure(situation, links)
    tell(f"measuring {len(chosen)} link(s) with {transport}")
    measured = measure_links({node.name: node for node in able}, chosen, transport)
    return replace(situation, links=measured)


def _model_folders(situation: Situation, given: str | None) -> dict[str, str]:
    return {
        name: given or software.volume.path
        for name, software in situation.software.items()
        if software.volume is not None
    }


def _links_to_measure(situation: Situation, links: Sequence[Link]) -> list[Link]:
    """Choose for each pair the fastest link whose addresses answered in both directions."""
    answered = {
        (reach.source, reach.target, reach.address)
        for reach in situation.reaches or ()
        if reach.error is None
    }
    chosen: dict[frozenset[str], Link] = {}
    for link in links:
        there = (link.first, link.second, link.second_address)
        back = (link.second, link.first, link.first_address)
        if there in answered and back in answered:
            chosen.setdefault(frozenset((link.first, link.second)), link)
    return list(chosen.values())


def _transport_to_measure(situation: Situation, links: Sequence[Link]) -> LinkTransport:
    """Return JACCL if a run would use it; else the ring, which uses TCP as MPI does."""
    wanted = situation.transport
    if wanted == "auto":
        wanted = recommended_transport(situation, links).backend
    return "jaccl" if wanted == "jaccl" else "ring"
