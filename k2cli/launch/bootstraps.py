"""What each guard is told: the plan, the addresses and the secret of a run, cut up by rank."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from k2cli.agent.openmpi import OpenMpi, find_libmpi
from k2cli.choices import Transport
from k2cli.errors import ClusterError
from k2cli.launch.routes import Routes
from k2cli.nodes.node import Node
from k2cli.planning.plan import Plan
from k2cli.protocol import Assignment, Bootstrap, Deadlines, HttpEndpoint


@dataclass(frozen=True, slots=True)
class Decided:
    """What is decided about a run before a guard is told of it.

    ``folders`` are the model's by node, ``environment`` is added to that of every rank, ``scratch``
    is mpirun's folder on this machine.
    """

    run_id: str
    nodes: Sequence[Node]
    plan: Plan
    transport: Transport
    routes: Routes
    folders: Mapping[str, str]
    model_name: str
    http: HttpEndpoint
    deadlines: Deadlines
    scratch: str | None
    environment: Mapping[str, str]
    restarts: bool


def make_bootstraps(run: Decided) -> list[Bootstrap]:
    """One bootstrap per rank, with ports that are free now and a fresh secret.

    Raises:
        UsageError: if the plan asks for a float type that does not exist.
        ClusterError: if a node cannot be asked, or lacks what the transport needs.
    """
    assignments, liveness_port = _assignments(run)
    environments = _environments(run.nodes, run.transport)
    secret = secrets.token_hex(32)
    return [
        Bootstrap(
            assignment=assignment,
            secret=secret,
            liveness_host=run.routes.reached[0],
            liveness_port=liveness_port,
            model_name=run.model_name,
            http=run.http if assignment.rank == 0 else None,
            environment={**run.environment, **environments[node.name]},
            deadlines=run.deadlines,
            restarts=run.restarts,
        )
        for assignment, node in zip(assignments, run.nodes, strict=True)
    ]


def _assignments(run: Decided) -> tuple[list[Assignment], int]:
    """What each rank is to hold and whom it meets where; and the port of liveness."""
    liveness_port, coordinator_port, ring = _ports(run.nodes, run.routes.ring)
    coordinator = (
        f"{run.routes.reached[0]}:{coordinator_port}" if run.transport == "jaccl" else None
    )
    common = _assignment_of_leader(run)
    assignments = [
        replace(
            common,
            rank=rank,
            model_path=run.folders[node.name],
            jaccl_devices=run.routes.rdma,
            jaccl_coordinator=coordinator,
            ring_hosts=ring if run.transport == "ring" else None,
            wired_limit_bytes=run.plan.nodes[rank].limit_bytes,
            cache_limit_bytes=run.plan.nodes[rank].overhead_bytes,
        )
        for rank, node in enumerate(run.nodes)
    ]
    return assignments, liveness_port


def _assignment_of_leader(run: Decided) -> Assignment:
    plan = run.plan
    return Assignment(
        run_id=run.run_id,
        rank=0,
        size=len(run.nodes),
        nodes=[node.name for node in run.nodes],
        transport=run.transport,
        model_path=run.folders[run.nodes[0].name],
        strategy=plan.placement.strategy,
        layers=[part.layers for part in plan.placement.ranks],
        dtype=plan.request.dtype,
        context_length=plan.request.context_length,
        concurrency=plan.request.concurrency,
        prefill_chunk_tokens=plan.request.prefill_chunk_tokens,
        expected_weights_bytes=[node.weights_bytes for node in plan.nodes],
        expected_cache_bytes=[node.kv_cache_bytes for node in plan.nodes],
        head=plan.placement.head,
    )


def _ports(nodes: Sequence[Node], reached: Sequence[str]) -> tuple[int, int, list[list[str]]]:
    """Two ports on the leader's node (liveness, coordinator) and one ring address per rank."""
    leader = nodes[0].name
    names = [node.name for node in nodes]
    known = {node.name: node for node in nodes}
    ports = {
        name: iter(node.free_ports(names.count(name) + 2 * (name == leader)))
        for name, node in known.items()
    }
    liveness_port, coordinator_port = next(ports[leader]), next(ports[leader])
    ring = [
        [f"{address}:{next(ports[name])}"] for name, address in zip(names, reached, strict=True)
    ]
    return liveness_port, coordinator_port, ring


def _environments(nodes: Sequence[Node], transport: Transport) -> dict[str, dict[str, str]]:
    """What the ranks of each node need in their environment."""
    known = {node.name: node for node in nodes}
    if transport != "mpi":
        return {name: {} for name in known}
    found = {name: _libmpi_of(node) for name, node in known.items()}
    for name, path in found.items():
        if path is None:
            raise ClusterError(
                f"node {name} has no Open MPI library",
                "install the openmpi wheel there, or use --backend ring",
            )
    return {name: {"MLX_MPI_LIBNAME": path} for name, path in found.items() if path is not None}


def _libmpi_of(node: Node) -> str | None:
    """The MPI library that a node's rank is to load: that of this machine's mpirun if it is there.

    A command over ssh may find another mpirun first on its PATH, whose library belongs to another
    version than the mpirun that starts the rank; the rank would not get past MPI_Init.
    """
    own = find_libmpi()
    if own is not None and node.run(["test", "-f", str(own)]).status == 0:
        return str(own)
    return node.facts().libmpi


def mpi_prefixes(nodes: Sequence[Node], mpi: OpenMpi) -> dict[str, str]:
    """Where each node has the Open MPI that its ranks load; "" is this machine.

    Raises:
        ClusterError: if a node has none, or one of another major version, which cannot talk to
            this machine's.
    """
    found = {"": str(mpi.mpirun.parent.parent)}
    for name, node in {node.name: node for node in nodes}.items():
        if node.is_local or node.run(["test", "-x", str(mpi.mpirun)]).status == 0:
            found[name] = found[""]
            continue
        facts = node.facts()
        if facts.mpirun is None:
            raise ClusterError(
                f"node {name} has no mpirun",
                f"k2 cluster prepare --nodes {name}; or --backend ring",
            )
        if facts.mpi_major != mpi.major:
            raise ClusterError(
                f"node {name} has Open MPI {facts.mpi_major}, this machine {mpi.major}",
                "install the same major version on both; or --backend ring",
            )
        found[name] = str(Path(facts.mpirun).parent.parent)
    return found
