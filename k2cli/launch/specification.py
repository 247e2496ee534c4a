"""The decisions of a launch, and the specification of a run that a supervisor is given.

The specification lies in the run's folder as ``launch.json`` (mode 0600, it holds the run's secret)
until the run has ended, so that ``launch --detach`` can hand a run to a supervisor in another
process. It holds one bootstrap per rank: the file that the rank's guard reads.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from k2cli.access.keys import KeyChoice
from k2cli.agent.run_folder import write_private
from k2cli.choices import Transport
from k2cli.errors import ClusterError
from k2cli.files import decode_json, read_regular
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.protocol import (
    Assignment,
    Bootstrap,
    Deadlines,
    HttpEndpoint,
    LinkCheck,
    PlannedRank,
    PlannedRun,
)
from k2cli.sharding.latent_ways import expansion_weight
from k2cli.units import MB

if TYPE_CHECKING:
    from k2cli.access.tls_files import TlsReport
    from k2cli.cluster.description import Cluster
    from k2cli.launch.model_source import ModelSource
    from k2cli.launch.request import LaunchRequest
    from k2cli.launch.routes import Routes
    from k2cli.nodes.node import Node
    from k2cli.planning.hardware.machine import NodeMemory
    from k2cli.planning.plan import NodeBudget, Plan
    from k2cli.runs.record import RunRecord

_NAME = "launch.json"
_LIMIT_BYTES = 16 * 2**20
FreePorts = Callable[[str, int], list[int]]
"""Returns that many free ports of the node with that name."""


@dataclass(slots=True, eq=False)
class RunDecisions:
    """All decisions of one launch. Each step of ``prepare_run`` sets some of the fields.

    ``nodes`` has one entry per rank. ``model_folders``, ``environments`` (variables for the ranks)
    and ``mpi_prefixes`` (where Open MPI is installed, "" for this machine) are by name of the node.
    ``wanted_transport`` and its reason are those before the plan, which may change them.
    ``machines`` are what the plan was made for, empty for a plan from a file without GPUs.
    ``tls`` describes the certificate of the API, None for an API without TLS.
    """

    request: LaunchRequest
    plan_given: Plan | None = field(init=False)
    cluster: Cluster | None = field(init=False)
    nodes: Sequence[Node] = field(init=False)
    model: ModelSource = field(init=False)
    wanted_transport: tuple[Transport, str] = field(init=False)
    transport: Transport = field(init=False)
    transport_reason: str = field(init=False)
    machines: Sequence[NodeMemory] = field(init=False)
    plan: Plan = field(init=False)
    model_folders: Mapping[str, str] = field(init=False)
    routes: Routes = field(init=False)
    model_name: str = field(init=False)
    run_id: str = field(init=False)
    http: HttpEndpoint = field(init=False)
    generated_api_key: bool = field(init=False)
    named_keys: KeyChoice = field(init=False)
    tls: TlsReport | None = field(init=False)
    environments: dict[str, dict[str, str]] = field(init=False)
    mpi_prefixes: dict[str, str] = field(init=False)
    record: RunRecord = field(init=False)


class RunSpecification(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One bootstrap per rank, in rank order, and how to start the guards.

    ``worker`` is the module that a rank runs. ``networks`` are those that MPI may use between
    machines. ``locked``: the supervisor must release the locks of the nodes. ``named_keys`` are
    those that the API accepts, by the supervisor's file of them. ``lease_cause``: why the
    supervisor ends the run once nobody holds its lease; empty for a run that stays.
    """

    bootstraps: list[Bootstrap]
    worker: str
    networks: list[str] = []
    mpi_prefixes: dict[str, str] = {}
    restart: RestartPolicy = RestartPolicy()
    locked: bool = False
    named_keys: KeyChoice = "none"
    lease_cause: str = ""

    @property
    def run_id(self) -> str:
        return self.bootstraps[0].assignment.run_id

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes, one per rank."""
        return self.bootstraps[0].assignment.nodes

    @property
    def transport(self) -> Transport:
        return self.bootstraps[0].assignment.transport

    @property
    def deadlines(self) -> Deadlines:
        return self.bootstraps[0].deadlines


def make_specification(run: RunDecisions) -> RunSpecification:
    """Make the specification of a run whose other decisions are made.

    Raises:
        ClusterError: if a node cannot be asked for free ports.
    """
    return RunSpecification(
        bootstraps=_make_bootstraps(run),
        worker=run.request.worker,
        networks=run.routes.networks,
        mpi_prefixes=run.mpi_prefixes,
        restart=run.request.restart,
        locked=True,
        named_keys=run.named_keys,
        lease_cause=run.request.lease_cause,
    )


def save_specification(specification: RunSpecification) -> None:
    """Write the specification into the run's folder."""
    write_private(specification.run_id, _NAME, msgspec.json.encode(specification))


def read_specification(folder: Path) -> RunSpecification:
    """Read the specification from a run's folder.

    Raises:
        ClusterError: if it is missing or of another version of k2.
    """
    try:
        return decode_json(read_regular(folder / _NAME, _LIMIT_BYTES), type=RunSpecification)
    except (OSError, msgspec.MsgspecError) as error:
        raise ClusterError(f"{folder} contains no run that can be started: {error}") from error


# --- bootstraps ---------------------------------------------------------------------------------


def _make_bootstraps(run: RunDecisions) -> list[Bootstrap]:
    """Make one bootstrap per rank, with ports that are free now and a fresh secret."""
    names = [node.name for node in run.nodes]
    known = {node.name: node for node in run.nodes}
    liveness_port, coordinator_port, ring_ports = _choose_ports(
        names, lambda name, count: known[name].free_ports(count)
    )
    ring = coordinator = None
    if run.transport == "ring":
        addresses = zip(run.routes.ring, ring_ports, strict=True)
        ring = [[f"{address}:{port}"] for address, port in addresses]
    elif run.transport == "jaccl":
        coordinator = f"{run.routes.reached[0]}:{coordinator_port}"
    elif run.routes.nccl is not None:
        coordinator = f"{run.routes.nccl.host}:{coordinator_port}"
    secret = secrets.token_hex(32)
    return [
        Bootstrap(
            assignment=_assignment(run, rank, ring, coordinator),
            secret=secret,
            liveness_host=run.routes.reached[0],
            liveness_port=liveness_port,
            model_name=run.model_name,
            http=run.http if rank == 0 else None,
            environment=run.environments[name],
            gpu=run.plan.nodes[rank].gpu,
            deadlines=run.request.deadlines,
            restarts=run.request.restart.mode != "never",
            planned=_planned(run) if rank == 0 else None,
        )
        for rank, name in enumerate(names)
    ]


def _planned(run: RunDecisions) -> PlannedRun:
    """Return what reports say about the plan."""
    ranks = [
        PlannedRank(
            budget.total_bytes,
            budget.limit_bytes,
            budget.weights_bytes,
            budget.kv_cache_bytes,
            budget.activation_bytes,
            budget.overhead_bytes,
            budget.backend,
            budget.gpu.label if budget.gpu is not None else "",
        )
        for budget in run.plan.nodes
    ]
    return PlannedRun(ranks, run.transport_reason, run.routes.interfaces)


def _assignment(
    run: RunDecisions, rank: int, ring: list[list[str]] | None, coordinator: str | None
) -> Assignment:
    plan, nccl = run.plan, run.routes.nccl
    return Assignment(
        run_id=run.run_id,
        rank=rank,
        size=len(run.nodes),
        nodes=[node.name for node in run.nodes],
        transport=run.transport,
        model_path=run.model_folders[run.nodes[rank].name],
        strategy=plan.placement.strategy,
        layers=[part.layers for part in plan.placement.ranks],
        dtype=plan.request.dtype,
        context_length=plan.request.context_length,
        concurrency=plan.request.concurrency,
        prefill_chunk_tokens=plan.request.prefill_chunk_tokens,
        expected_weights_bytes=[node.weights_bytes for node in plan.nodes],
        expected_cache_bytes=[node.kv_cache_bytes for node in plan.nodes],
        head=plan.placement.head,
        jaccl_devices=run.routes.rdma,
        jaccl_coordinator=coordinator if run.transport == "jaccl" else None,
        nccl_coordinator=coordinator if nccl is not None else None,
        nccl_interface=nccl.interfaces[rank] if nccl is not None else None,
        ring_hosts=ring,
        wired_limit_bytes=plan.nodes[rank].limit_bytes,
        cache_limit_bytes=cache_limit_bytes(plan.nodes[rank]),
        memory_limit_bytes=memory_limit_bytes(plan.nodes[rank]),
        expansion_weight=expansion_weight(node.backend for node in plan.nodes),
        attention_block_tokens=plan.request.attention_block_tokens,
        meets=meets_of(run),
        link_check=link_check_of(run),
        prefix_disk_bytes=run.request.prefix_disk_bytes,
        prefix_disk_scope=own_prefix_scope(run) if rank == 0 else "",
        joins_projections=run.request.joins_projections,
        speculation=run.request.speculation,
        kv_bits=plan.request.kv_bits,
    )


def link_check_of(run: RunDecisions) -> LinkCheck | None:
    """Return the link check of a run: by default one if its ranks are on several nodes."""
    request, names = run.request, [node.name for node in run.nodes]
    apart = len(set(names)) > 1 or (request.link_check == "always" and len(names) > 1)
    if request.link_check == "never" or not apart:
        return None
    seconds = request.link_check_seconds
    if seconds is None:
        on_gpu = any(node.backend != "cpu" for node in run.plan.nodes)
        seconds = _LINK_CHECK_GPU_SECONDS if on_gpu else _LINK_CHECK_CPU_SECONDS
    return LinkCheck(list(request.link_check_tokens), seconds)


_LINK_CHECK_GPU_SECONDS, _LINK_CHECK_CPU_SECONDS = 120.0, 30.0
"""Two prefills of 4,096 tokens of Kimi K2 take two M3 Ultras 30 to 40 s. A CPU would take minutes,
and no wrong data of a CPU's transports was reported."""


def meets_of(run: RunDecisions) -> bool:
    """Return ``Assignment.meets``, the same for all ranks: a GPU of Metal must not wait long."""
    return any(node.backend == "metal" for node in run.plan.nodes)


def own_prefix_scope(run: RunDecisions) -> str:
    """Return whose stored prompts the run's own key finds: those of the same key.

    With ``--share-prefixes`` all keys use one scope, which is that of no key: a later run must not
    tell the holder of its own key what all others have asked.
    """
    if run.request.shares_prefixes:
        return "shared"
    return hashlib.sha256((run.http.api_key or "").encode()).hexdigest()


_UNCOUNTED_CUDA_BYTES = 1500 * MB
"""Memory of a rank on CUDA beside MLX's arrays and its context, with a margin: 0.9 to 1.8 GB seen
(docs/measurements/full-width.md), of which the plan's runtime_bytes cover 0.6."""


def cache_limit_bytes(budget: NodeBudget) -> int:
    """Return the limit on freed arrays that MLX keeps: on a GPU a step's temporary arrays too.

    On a CPU nothing would give them back before memory in use and kept exceeds the plan.
    """
    if budget.backend == "cpu":
        return budget.overhead_bytes
    return budget.activation_bytes + budget.overhead_bytes


def memory_limit_bytes(budget: NodeBudget) -> int | None:
    """Return the limit on MLX's memory, in use and kept: the plan without the program itself.

    On CUDA the libraries and MLX's graphs take memory that MLX does not count. It comes out of
    what MLX keeps of freed arrays, so that the whole program stays within the plan.
    """
    if budget.backend == "cpu" or budget.breakdown is None:
        return None
    limit = budget.total_bytes - budget.breakdown.runtime_bytes
    if budget.backend == "cuda":
        limit -= min(_UNCOUNTED_CUDA_BYTES, cache_limit_bytes(budget) // 3)
    return limit


def renew_bootstraps(
    bootstraps: Sequence[Bootstrap], free_ports: FreePorts, http_port: int | None
) -> list[Bootstrap]:
    """Return the bootstraps of the next attempt: with a new secret and new ports.

    Args:
        bootstraps: those of the previous attempt, one per rank.
        free_ports: finds free ports of a node.
        http_port: the API's port, which stays, if it is known.
    """
    before = bootstraps[0].assignment
    liveness_port, coordinator_port, ring_ports = _choose_ports(before.nodes, free_ports)
    ring, jaccl, nccl = before.ring_hosts, before.jaccl_coordinator, before.nccl_coordinator
    if ring is not None:
        ring = [
            [_with_port(address, port) for address in addresses]
            for addresses, port in zip(ring, ring_ports, strict=True)
        ]
    if jaccl is not None:
        jaccl = _with_port(jaccl, coordinator_port)
    if nccl is not None:
        nccl = _with_port(nccl, coordinator_port)
    secret = secrets.token_hex(32)
    return [
        replace(
            bootstrap,
            assignment=replace(
                bootstrap.assignment,
                ring_hosts=ring,
                jaccl_coordinator=jaccl,
                nccl_coordinator=nccl,
            ),
            secret=secret,
            liveness_port=liveness_port,
            http=_on_port(bootstrap.http, http_port),
            hold=None,
            attempt=bootstrap.attempt + 1,
        )
        for bootstrap in bootstraps
    ]


def _choose_ports(names: Sequence[str], free_ports: FreePorts) -> tuple[int, int, list[int]]:
    """Choose the ports for liveness and a coordinator (JACCL, NCCL), and a ring port per rank."""
    leader = names[0]
    ports = {
        name: iter(free_ports(name, names.count(name) + 2 * (name == leader)))
        for name in dict.fromkeys(names)
    }
    liveness_port, coordinator_port = next(ports[leader]), next(ports[leader])
    return liveness_port, coordinator_port, [next(ports[name]) for name in names]


def _on_port(http: HttpEndpoint | None, port: int | None) -> HttpEndpoint | None:
    if http is None or port is None:
        return http
    return replace(http, port=port, next_port_will_do=False)


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
