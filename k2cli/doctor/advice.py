"""Recommendation of a run's transport and settings, from the doctor's findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from k2cli.choices import Transport, WantedTransport
from k2cli.cluster.description import Link
from k2cli.cluster.measure import LinkMeasurement
from k2cli.doctor.checks_network import rdma
from k2cli.doctor.results import Situation


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A transport (``backend`` in JSON), and the reason in one sentence."""

    backend: Transport
    reason: str


@dataclass(frozen=True, slots=True)
class Setting:
    """An environment variable or option for a run. ``value`` None: leave it unset."""

    name: str
    value: str | None
    reason: str


def recommended_transport(situation: Situation, links: Sequence[Link]) -> Recommendation:
    """Choose the transport for ranks on these nodes.

    Args:
        situation: the findings; measured links are compared if there are any.
        links: all links between the nodes, from ``cluster.links.detect_links``.
    """
    names = [node.node for node in situation.nodes]
    if len(names) < 2:
        return Recommendation("local", "one rank needs no other; launch chooses for several")
    obstacle = rdma_obstacle(situation, links)
    if obstacle is None:
        return Recommendation("jaccl", "every pair of nodes is joined by Thunderbolt with RDMA")
    measured = _fastest(situation.links or ())
    if measured is not None and measured.backend != "tcp":
        return Recommendation(measured.backend, f"{_because(measured)}; no RDMA: {obstacle}")
    without_mpi = mpi_obstacle(situation)
    if without_mpi is None:
        return Recommendation("mpi", f"all nodes have Open MPI of one version; no RDMA: {obstacle}")
    return Recommendation("ring", f"no RDMA: {obstacle}; no MPI: {without_mpi}")


def rdma_obstacle(situation: Situation, links: Sequence[Link]) -> str | None:
    """Return the reason that JACCL cannot connect all nodes; None if it can."""
    macs = situation.macs
    for node in situation.nodes:
        if node.node not in macs:
            return f"{node.node} is not a Mac"
    for name, software in situation.software.items():
        if "jaccl" not in software.transports:
            return f"mlx on {name} has no JACCL"
    bad = [result for result in rdma(situation) if result.status in ("warn", "fail", "skip")]
    if bad:
        return f"{bad[0].node}: {bad[0].detail}"
    for one, two in combinations([node.node for node in situation.nodes], 2):
        if not any(link.rdma and {link.first, link.second} == {one, two} for link in links):
            return f"no RDMA link joins {one} and {two}"
    return None


def mpi_obstacle(situation: Situation) -> str | None:
    """Return the reason that MPI cannot connect all nodes; None if it can."""
    majors = set()
    for node in situation.nodes:
        software = node.software
        if software is None:
            return f"k2 does not answer on {node.node}"
        version = software.mpi_version_with(situation.reference)
        if version is None or software.libmpi is None:
            return f"{node.node} has no Open MPI"
        majors.add(version.split(".")[0])
    return None if len(majors) <= 1 else "different major versions of Open MPI"


def _fastest(measured: Sequence[LinkMeasurement]) -> LinkMeasurement | None:
    """Rate each transport by its slowest link, and return that link of the fastest."""
    slowest: dict[str, LinkMeasurement] = {}
    failed = {each.backend for each in measured if each.all_reduce_seconds is None}
    for each in measured:
        worst = slowest.get(each.backend)
        if worst is None or _seconds(each) > _seconds(worst):
            slowest[each.backend] = each
    usable = [each for transport, each in slowest.items() if transport not in failed]
    return min(usable, key=_seconds, default=None)


def _seconds(measured: LinkMeasurement) -> float:
    return measured.all_reduce_seconds or float("inf")


def _because(measured: LinkMeasurement) -> str:
    micro = 1e6 * _seconds(measured)
    return f"measured {micro:.0f} us for a small all-reduce over {measured.kind}"


def recommended_settings(
    situation: Situation, transport: WantedTransport, links: Sequence[Link]
) -> tuple[Setting, ...]:
    """Settings for a run on these nodes with this transport, each with its reason.

    Sources: MLX's documentation of JACCL and MLX_METAL_FAST_SYNCH; ml-explore/mlx#4438 (180 us per
    crossing without it, 4 us with), #3142 and #3830 (GPUs wedged with it).
    """
    settings = []
    if situation.macs and transport != "local":
        settings.append(
            Setting(
                "MLX_METAL_FAST_SYNCH",
                None,
                "1 saves about 180 us per CPU-GPU crossing (mlx#4438), and GPUs have hung with it "
                "until a restart (mlx#3142, mlx#3830): set it yourself to try it",
            )
        )
    if transport == "mpi":
        settings += _interface_settings(situation, links)
    return tuple(settings)


def _interface_settings(situation: Situation, links: Sequence[Link]) -> list[Setting]:
    """Limit MPI to the fastest links: it would also try docker's bridges, which lead nowhere."""
    names = [node.node for node in situation.nodes]
    found: dict[frozenset[str], Link] = {}
    for link in links:
        if link.first_address and link.second_address:
            found.setdefault(frozenset((link.first, link.second)), link)
    if len(found) < len(list(combinations(names, 2))):
        return []
    ends = {
        interface
        for link in found.values()
        for interface in (link.first_interface, link.second_interface)
    }
    kinds = sorted({link.kind for link in found.values()})
    reason = f"the fastest link between the nodes ({', '.join(kinds)})"
    return [Setting("btl_tcp_if_include", ",".join(sorted(ends)), reason)]
