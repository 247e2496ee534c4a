"""From a request to a run that can be started: locks, ports, secrets, bootstraps, record.

Everything that can be wrong with a launch before a process of it exists is found here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from k2cli.agent.openmpi import find_openmpi
from k2cli.agent.run_folder import make_scratch, remove_scratch, run_folder, write_private
from k2cli.choices import Transport
from k2cli.cluster.node_lookup import node_named
from k2cli.errors import K2Error, UsageError
from k2cli.launch.backend import Choice, check_nodes
from k2cli.launch.bootstraps import Decided, make_bootstraps, mpi_prefixes
from k2cli.launch.model_copies import model_folders
from k2cli.launch.model_source import ModelHere, model_here
from k2cli.launch.plan import check_plan, make_launch_plan, read_plan
from k2cli.launch.request import LaunchRequest, node_names
from k2cli.launch.routes import Routes, find_routes
from k2cli.launch.specification import RunSpecification, save_specification
from k2cli.models.reference import is_path
from k2cli.nodes.locks import Say, release_locks, take_locks
from k2cli.nodes.node import LOCALHOST, Node
from k2cli.planning.plan import Plan, plan_to_json
from k2cli.protocol import HttpEndpoint
from k2cli.runs.record import RankRecord, RunRecord, prune_records, save_record
from k2cli.runs.run_id import new_run_id
from k2cli.units import format_bytes

if TYPE_CHECKING:
    from k2cli.cluster.description import Cluster

DEFAULT_HTTP_PORT = 8080


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run whose folder is written and whose processes are not started yet."""

    record: RunRecord
    plan: Plan
    specification: RunSpecification
    generated_api_key: bool


def prepare_run(request: LaunchRequest, say: Say = lambda text: None) -> PreparedRun:
    """Decide everything about a run, take its machines, and write its folder.

    Args:
        request: what the user asked for.
        say: told what is waited for, and what is amiss without being in the way.

    Raises:
        UsageError: for a request that makes no sense.
        DoesNotFitError: if the plan does not fit and ``force`` is not set.
        ClusterError: if a node cannot be reached, is not fit for a run, or belongs to another one.
        K2Error: if the model is neither here nor on the first node, or the port is taken.
    """
    given_plan = read_plan(request)
    cluster = _cluster_of(request)
    nodes = [node_named(name) for name in node_names(request, given_plan, cluster)]
    with model_here(request.model, nodes) as here:
        return _prepare(request, here, given_plan, cluster, nodes, say)


def _cluster_of(request: LaunchRequest) -> Cluster | None:
    if request.cluster is None:
        return None
    from k2cli.cluster.description import load_cluster

    return load_cluster(request.cluster)


def _prepare(
    request: LaunchRequest,
    here: ModelHere,
    given_plan: Plan | None,
    cluster: Cluster | None,
    nodes: Sequence[Node],
    say: Say,
) -> PreparedRun:
    folder = here.folder
    choice = check_nodes(nodes, request.transport, say, force=request.force)
    plan = given_plan or make_launch_plan(request, folder, nodes, choice.transport)
    check_plan(plan, folder, nodes, force=request.force)
    folders = {node.name: str(folder) for node in nodes}
    if not all(node.is_local for node in nodes):
        folders = model_folders(nodes, _seen_from_everywhere(request.model), here)
    routes = find_routes(nodes, choice.transport, cluster)
    run_id = new_run_id(_served_name(request.model, folder))
    take_locks(
        nodes,
        run_id,
        _needs(nodes, plan),
        share=request.share,
        wait_seconds=request.wait_seconds,
        say=say,
    )
    try:
        decided, generated = _decide(
            request, run_id, folder, folders, nodes, choice.transport, routes, plan, cluster
        )
        return _write_run(request, decided, choice, generated_key=generated)
    except BaseException:
        remove_scratch(run_id)
        shutil.rmtree(run_folder(run_id), ignore_errors=True)
        release_locks(nodes, run_id)
        raise


def _needs(nodes: Sequence[Node], plan: Plan) -> dict[str, tuple[int, int]]:
    """Bytes that the ranks of each node need together, and bytes that it has."""
    needs: dict[str, tuple[int, int]] = {}
    for node, budget in zip(nodes, plan.nodes, strict=True):
        before = needs.get(node.name, (0, 0))[0]
        needs[node.name] = (before + budget.total_bytes, budget.limit_bytes)
    return needs


def _seen_from_everywhere(reference: str) -> str:
    if reference.startswith("~"):  # each machine has its own home
        return reference
    return str(Path(reference).absolute()) if is_path(reference) else reference


# --- the run's folder ---------------------------------------------------------------------------


def _decide(
    request: LaunchRequest,
    run_id: str,
    folder: Path,
    folders: Mapping[str, str],
    nodes: Sequence[Node],
    transport: Transport,
    routes: Routes,
    plan: Plan,
    cluster: Cluster | None,
) -> tuple[Decided, bool]:
    """All that guards are told, and whether the API's key was made up here."""
    port = _http_port(nodes[0], request.host, request.port)
    api_key, generated = _api_key(request)
    decided = Decided(
        run_id=run_id,
        nodes=nodes,
        plan=plan,
        transport=transport,
        routes=routes,
        folders=folders,
        model_name=_served_name(request.model, folder),
        http=HttpEndpoint(request.host, port, api_key, next_port_will_do=request.port is None),
        deadlines=request.deadlines,
        scratch=str(make_scratch(run_id)) if transport == "mpi" else None,
        environment=_environment(request, cluster),
        restarts=request.restart.mode != "never",
    )
    return decided, generated


def _write_run(
    request: LaunchRequest, decided: Decided, choice: Choice, *, generated_key: bool
) -> PreparedRun:
    prune_records()
    run_id, nodes, routes, plan = decided.run_id, decided.nodes, decided.routes, decided.plan
    specification = RunSpecification(
        run_id=run_id,
        nodes=[node.name for node in nodes],
        transport=decided.transport,
        bootstraps=make_bootstraps(decided),
        worker=request.worker,
        scratch=decided.scratch,
        networks=routes.networks,
        mpi_prefixes=mpi_prefixes(nodes, find_openmpi()) if decided.transport == "mpi" else {},
        restart=request.restart,
        locked=True,
    )
    settings = _settings(choice, routes, specification)
    record = _record(request, specification, decided, settings)
    write_private(run_id, "plan.json", plan_to_json(plan))
    if decided.http.api_key is not None:
        write_private(run_id, "api-key", decided.http.api_key.encode())
    save_specification(specification)
    save_record(record)
    return PreparedRun(record, plan, specification, generated_key)


def _environment(request: LaunchRequest, cluster: Cluster | None) -> dict[str, str]:
    """What every rank gets in its environment: of an imported hostfile, and of the options."""
    environment: dict[str, str] = {}
    if cluster is not None and cluster.hostfile is not None:
        from k2cli.cluster.hostfile import rank_environment

        environment |= rank_environment(cluster.hostfile)
    if request.fast_synch:
        environment["MLX_METAL_FAST_SYNCH"] = "1"
    return environment


def _settings(choice: Choice, routes: Routes, specification: RunSpecification) -> dict[str, str]:
    """What the run sets beside what was asked for, in words."""
    settings = {"backend": f"{choice.transport}: {choice.reason}"}
    if routes.words:
        settings["addresses"] = "; ".join(routes.words)
    if choice.transport == "mpi" and routes.networks:
        settings["btl_tcp_if_include"] = ",".join(routes.networks)
    if routes.rdma is not None:
        settings["rdma devices"] = str(routes.rdma)
    for name, value in specification.bootstraps[0].environment.items():
        settings[name] = value
    if not any(node.is_local for node in map(node_named, specification.nodes)):
        return settings
    limit = specification.bootstraps[0].assignment.wired_limit_bytes
    if sys.platform == "darwin" and limit is not None:
        settings["wired limit"] = format_bytes(limit)
    return settings


def _record(
    request: LaunchRequest,
    specification: RunSpecification,
    decided: Decided,
    settings: dict[str, str],
) -> RunRecord:
    own = psutil.Process()
    return RunRecord(
        run_id=specification.run_id,
        # A path must mean the same to a command that is given in another folder.
        model=_seen_from_everywhere(request.model),
        model_name=decided.model_name,
        state="starting",
        backend=specification.transport,
        strategy=decided.plan.placement.strategy,
        context_length=decided.plan.request.context_length,
        ranks=tuple(RankRecord(rank, name) for rank, name in enumerate(specification.nodes)),
        created=time.time(),
        host=request.host,
        port=decided.http.port,
        # Until a supervisor takes over, this process answers for the run.
        pid=own.pid,
        pid_create_time=own.create_time(),
        restart=request.restart.mode,
        settings=settings,
    )


def _served_name(reference: str, folder: Path) -> str:
    """What clients call the model: the reference, or the folder's name for a path."""
    return folder.name if is_path(reference) else reference


def _http_port(leader: Node, host: str, wanted: int | None) -> int:
    if wanted is None:
        return leader.choose_port(host, DEFAULT_HTTP_PORT)
    if not 1 <= wanted <= 65535:
        raise UsageError(f"--port {wanted} is not between 1 and 65535")
    holder = leader.port_holder(host, wanted)
    if holder is not None:
        free = leader.choose_port(host, DEFAULT_HTTP_PORT)
        raise K2Error(f"port {wanted} of {leader.name} cannot be used: {holder}", f"--port {free}")
    return wanted


def _api_key(request: LaunchRequest) -> tuple[str | None, bool]:
    if request.api_key:
        return request.api_key, False
    if _is_loopback(request.host):
        return None, False
    return f"k2-{secrets.token_urlsafe(24)}", True


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == LOCALHOST
