"""Discovery of a cluster: its description and its activity, by asking all machines at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from k2cli.agent.activity import Activity, RunActivity
from k2cli.agent.locks import Lock
from k2cli.cluster.description import Cluster, ClusterNode
from k2cli.cluster.facts.machine import MachineFacts
from k2cli.cluster.facts.probes import collect
from k2cli.cluster.facts.reading import machine_facts
from k2cli.cluster.hostfile import Hostfile
from k2cli.cluster.links import detect_links
from k2cli.cluster.node_lookup import cluster_nodes, node_named
from k2cli.errors import ClusterError, UsageError
from k2cli.nodes.node import Node
from k2cli.nodes.parallel import in_parallel
from k2cli.planning.hardware.chips import chip_of_device
from k2cli.units import GIB


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """A machine's answer: its facts, or ``error``, the reason that they are not known.

    ``python`` runs this version of k2 there; if it is None, ``error`` is the reason.
    """

    name: str
    facts: MachineFacts | None
    python: str | None = None
    error: ClusterError | None = None

    @property
    def problem(self) -> str | None:
        return self.error.message if self.error else None

    @property
    def hint(self) -> str | None:
        return self.error.hint if self.error else None


def ask_machine(node: Node) -> NodeAnswer:
    """Ask one machine for its facts, with or without k2 installed there."""
    try:
        node.run(["true"])  # raises an error with the full reason if it cannot be reached
        facts = machine_facts(collect(node, quick=True))
    except ClusterError as error:
        return NodeAnswer(node.name, None, None, error)
    try:
        return NodeAnswer(node.name, facts, node.python)
    except ClusterError as error:
        return NodeAnswer(node.name, facts, None, error)


def ask_machines(nodes: Sequence[Node]) -> Iterator[NodeAnswer]:
    """Ask all machines at once; yields the answers in the order of arrival."""
    yield from in_parallel(ask_machine, nodes)


def nodes_from_names(names: Sequence[str]) -> list[Node]:
    """Make nodes from names that the user gave.

    Raises:
        UsageError: if there is no name, or one is repeated or cannot be a name for ssh.
    """
    nodes: list[Node] = []
    for name in names:
        node = node_named(name)
        if node.name in [known.name for known in nodes]:
            raise UsageError(f"'{name}' names a machine that is already in the list")
        nodes.append(node)
    if not nodes:
        raise UsageError("no host is named", "k2 cluster init localhost HOST --name NAME")
    return nodes


def discover(
    name: str,
    hosts: Sequence[str],
    on_answer: Callable[[NodeAnswer], None] = lambda _: None,
    hostfile: Hostfile | None = None,
) -> Cluster:
    """Describe a cluster by asking its machines.

    Args:
        name: the name of the cluster.
        hosts: names for ssh; every name of this machine is ``localhost``.
        on_answer: called with each machine's answer when it arrives.
        hostfile: MLX's hostfile, if the hosts were read from one.

    Raises:
        UsageError: if a name is unusable.
        ClusterError: if machines do not answer; names all of them.
    """
    nodes = nodes_from_names(hosts)
    answers: dict[str, NodeAnswer] = {}
    for answer in ask_machines(nodes):
        on_answer(answer)
        answers[answer.name] = answer
    machines = {node.name: answers[node.name].facts for node in nodes}
    known = {node: facts for node, facts in machines.items() if facts is not None}
    if len(known) < len(nodes):
        raise _unanswered([answers[node.name] for node in nodes if node.name not in known])
    described = (describe_node(node, known[node], answers[node].python) for node in known)
    return Cluster(name, tuple(described), detect_links(known), hostfile=hostfile)


def _unanswered(failed: Sequence[NodeAnswer]) -> ClusterError:
    if len(failed) == 1 and failed[0].error is not None:
        return failed[0].error
    names = ", ".join(answer.name for answer in failed)
    reasons = "; ".join(answer.problem or "" for answer in failed)
    return ClusterError(f"{len(failed)} machines do not answer ({names}): {reasons}")


def describe_node(name: str, facts: MachineFacts, python: str | None) -> ClusterNode:
    """Make a machine's entry in the description."""
    return ClusterNode(
        name=name,
        hostname=facts.hostname,
        os=f"macOS {facts.os_version}" if facts.os_name == "macos" else facts.os_version,
        chip=facts.chip,
        memory_bytes=facts.memory_bytes,
        limit_bytes=facts.limit_bytes,
        limit_mark=facts.limit_mark,
        device=facts.backend,
        bandwidth_bytes_per_second=facts.bandwidth_bytes_per_second or _chip_bandwidth(facts),
        interfaces={name: tuple(found) for name, found in facts.interfaces.items()},
        interface_kinds=dict(facts.interface_kinds),
        rdma_devices=tuple(facts.rdma_devices),
        python=python,
        limit_source=facts.limit_source,
        gpu_cores=facts.gpu_cores,
        gpus=tuple(gpu.lasting() for gpu in facts.gpus) or msgspec.UNSET,
    )


def _chip_bandwidth(facts: MachineFacts) -> int | None:
    """Return the peak bandwidth of a machine's chip, or None if the catalog lacks it."""
    chip = chip_of_device(facts.chip)
    if chip is None:
        return None
    memory_gib = facts.memory_bytes // GIB
    cores = facts.gpu_cores or chip.usual_gpu_cores(memory_gib)
    return chip.bandwidth_bytes_per_second(cores, memory_gib)


def cluster_from_hostfile(name: str, hostfile: Hostfile) -> Cluster:
    """Make a cluster from a hostfile without asking its machines: their memory is unknown."""
    names = dict.fromkeys(node_named(host.ssh).name for host in hostfile.hosts)
    return Cluster(name, tuple(ClusterNode(node) for node in names), hostfile=hostfile)


@dataclass(frozen=True, slots=True)
class NodeActivity:
    """Runs that have processes on a node, and the locks on it."""

    runs: tuple[RunActivity, ...] = ()
    locks: tuple[Lock, ...] = ()


def node_activities(cluster: Cluster) -> tuple[dict[str, NodeActivity], dict[str, str]]:
    """Ask each machine for its activity; returns activities and errors, by node."""
    answers = dict(in_parallel(_activity, cluster_nodes(cluster)))
    found = {name: answer for name, answer in answers.items() if isinstance(answer, NodeActivity)}
    problems = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    return found, problems


def _activity(node: Node) -> tuple[str, NodeActivity | str]:
    try:
        running: Activity = node.ask(Activity, "activity")
        locks: tuple[Lock, ...] = node.ask(tuple[Lock, ...], "locks")
    except ClusterError as error:
        return node.name, error.message
    return node.name, NodeActivity(running.runs, locks)
