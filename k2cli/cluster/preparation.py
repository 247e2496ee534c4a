"""From a command line to a run that can be started: plan, ports, secrets, bootstraps, record.

Everything that can be wrong with a launch before a process exists is found here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from k2cli.cluster import agent
from k2cli.cluster.bootstraps import make_bootstraps, mpi_prefixes
from k2cli.cluster.description import Cluster, load_cluster
from k2cli.cluster.hostfile import rank_environment
from k2cli.cluster.launchers import DEFAULT_WORKER
from k2cli.cluster.locks import Say, release_locks, take_locks
from k2cli.cluster.model_here import ModelHere, is_path, model_here
from k2cli.cluster.model_there import model_folders
from k2cli.cluster.nodes import LOCALHOST, Node, node_named
from k2cli.cluster.openmpi import find_openmpi
from k2cli.cluster.readiness import Choice, check_nodes
from k2cli.cluster.restarting import RestartPolicy
from k2cli.cluster.routes import Routes, find_routes
from k2cli.cluster.runs import RankRecord, RunRecord, new_run_id, prune_records, save_record
from k2cli.cluster.specification import RunSpecification, save_specification
from k2cli.errors import DoesNotFitError, K2Error, UsageError
from k2cli.planning.plan import NodeBudget, Plan, plan_from_json, plan_to_json
from k2cli.runtime.protocol import Deadlines, HttpEndpoint
from k2cli.units import format_bytes

DEFAULT_HTTP_PORT = 8080


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What the user asked for. None and ``auto`` leave it to k2."""

    model: str
    nodes: tuple[str, ...] | None = None
    backend: str = "auto"
    parallel: str = "auto"
    dtype: str = "auto"
    head: str = "auto"
    context_length: int | None = None
    concurrency: int | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    plan_file: Path | None = None
    force: bool = False
    cluster: str | None = None
    share: bool = False
    wait_seconds: float = 0.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    fast_synch: bool = False
    deadlines: Deadlines = field(default_factory=Deadlines)
    worker: str = DEFAULT_WORKER


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
    given_plan = _read_plan(request)
    cluster = load_cluster(request.cluster) if request.cluster is not None else None
    nodes = [node_named(name) for name in _node_names(request, given_plan, cluster)]
    with model_here(request.model, nodes) as here:
        return _prepare(request, here, given_plan, cluster, nodes, say)


def _prepare(
    request: LaunchRequest,
    here: ModelHere,
    given_plan: Plan | None,
    cluster: Cluster | None,
    nodes: Sequence[Node],
    say: Say,
) -> PreparedRun:
    folder = here.folder
    choice = check_nodes(nodes, request.backend, say, force=request.force)
    plan = given_plan or _make_plan(request, folder, nodes, choice.backend)
    _check_plan(plan, folder, nodes, force=request.force)
    folders = {node.name: str(folder) for node in nodes}
    if not all(node.is_local for node in nodes):
        folders = model_folders(nodes, _seen_from_everywhere(request.model), here)
    routes = find_routes(nodes, choice.backend, cluster)
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
        environment = _environment(request, cluster)
        return _write_run(
            request, run_id, folder, folders, nodes, choice, routes, plan, environment
        )
    except BaseException:
        agent.remove_scratch(run_id)
        shutil.rmtree(agent.run_folder(run_id), ignore_errors=True)
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


# --- the plan -----------------------------------------------------------------------------------


def _read_plan(request: LaunchRequest) -> Plan | None:
    path = request.plan_file
    if path is None:
        return None
    contradicting = {
        "--parallel": request.parallel != "auto",
        "--dtype": request.dtype != "auto",
        "--context": request.context_length is not None,
        "--concurrency": request.concurrency is not None,
        "--head": request.head != "auto",
    }
    for option, given in contradicting.items():
        if given:
            raise UsageError(f"{option} is decided by the plan {path}", f"leave out {option}")
    try:
        return plan_from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"the plan {path} cannot be read: {error.strerror}") from error


def _node_names(
    request: LaunchRequest, plan: Plan | None, cluster: Cluster | None
) -> Sequence[str]:
    if request.nodes is not None:
        if not all(request.nodes):
            raise UsageError(f"--nodes '{','.join(request.nodes)}' has an empty name")
        if odd := [name for name in request.nodes if name.startswith("-") or " " in name]:
            raise UsageError(f"'{odd[0]}' is no name of a node")
        return request.nodes
    if cluster is not None:
        return [node.name for node in cluster.nodes]
    if plan is None:
        return [LOCALHOST]
    names = [part.node for part in plan.placement.ranks]
    if any("/" in name for name in names):
        # Names such as m3-ultra-512/1 are machines of the catalog.
        raise UsageError(
            f"the plan is for {', '.join(names)}, which are no machines of yours",
            f"--nodes {','.join([LOCALHOST] * len(names))}",
        )
    return names


def _make_plan(request: LaunchRequest, folder: Path, nodes: Sequence[Node], backend: str) -> Plan:
    from dataclasses import replace

    from k2cli.planning.calibrated import with_calibration
    from k2cli.planning.planner import make_plan, make_roomy_plan

    known = {node.name: node.memory() for node in {node.name: node for node in nodes}.values()}
    link = "auto" if backend == "local" else backend
    memory = with_calibration([known[node.name] for node in nodes], link)
    wishes = {
        "strategy": request.parallel,
        "dtype": request.dtype,
        "head": request.head,
        "backend": link,
    }
    context = request.context_length
    if request.concurrency is None:
        plan = make_roomy_plan(str(folder), memory, context_length=context, **wishes)
    else:
        plan = make_plan(
            str(folder),
            memory,
            context_length=context,
            concurrency=request.concurrency,
            **wishes,
        )
    return replace(plan, model=replace(plan.model, reference=request.model))


def _check_plan(plan: Plan, folder: Path, nodes: Sequence[Node], *, force: bool) -> None:
    if plan.placement.size != len(nodes):
        raise UsageError(
            f"the plan is for {plan.placement.size} rank(s), and {len(nodes)} node(s) are named"
        )
    layers = _layer_count(folder)
    if layers is not None and layers != plan.placement.layer_count:
        raise UsageError(
            f"the plan places {plan.placement.layer_count} layers, the model has {layers}",
            f"k2 plan-memory {plan.model.reference} --hardware SPEC --save plan.json",
        )
    if not plan.fits and not force:
        raise _does_not_fit(plan)


def _layer_count(folder: Path) -> int | None:
    from k2cli.models.checkpoint import read_config

    config = read_config(folder)
    count = (config.get("text_config") or config).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def _does_not_fit(plan: Plan) -> DoesNotFitError:
    worst: NodeBudget = min(plan.nodes, key=lambda node: node.headroom_bytes)
    return DoesNotFitError(
        f"{plan.model.reference} does not fit: {worst.name} needs "
        f"{format_bytes(worst.total_bytes)} and has {format_bytes(worst.limit_bytes)} "
        f"({format_bytes(-worst.headroom_bytes)} too little)",
        "a smaller --context, more nodes, a smaller quantization; or --force to try all the same",
    )


# --- the run's folder ---------------------------------------------------------------------------


def _write_run(
    request: LaunchRequest,
    run_id: str,
    folder: Path,
    folders: Mapping[str, str],
    nodes: Sequence[Node],
    choice: Choice,
    routes: Routes,
    plan: Plan,
    environment: Mapping[str, str],
) -> PreparedRun:
    port = _http_port(nodes[0], request.host, request.port)
    api_key, generated = _api_key(request)
    model_name = _served_name(request.model, folder)
    prune_records()
    prefixes = mpi_prefixes(nodes, find_openmpi()) if choice.backend == "mpi" else {}
    scratch = agent.make_scratch(run_id) if choice.backend == "mpi" else None
    specification = RunSpecification(
        run_id=run_id,
        nodes=[node.name for node in nodes],
        backend=choice.backend,
        bootstraps=make_bootstraps(
            nodes,
            plan,
            run_id=run_id,
            folders=folders,
            backend=choice.backend,
            routes=routes,
            model_name=model_name,
            http=HttpEndpoint(request.host, port, api_key, next_port_will_do=request.port is None),
            deadlines=request.deadlines,
            scratch=str(scratch) if scratch else None,
            environment=environment,
            restarts=request.restart.mode != "never",
        ),
        worker=request.worker,
        scratch=str(scratch) if scratch else None,
        networks=routes.networks,
        mpi_prefixes=prefixes,
        restart=request.restart,
        locked=True,
    )
    settings = _settings(choice, routes, specification)
    record = _record(request, specification, plan, model_name, port, settings)
    agent.write_private(run_id, "plan.json", plan_to_json(plan))
    if api_key is not None:
        agent.write_private(run_id, "api-key", api_key.encode())
    save_specification(specification)
    save_record(record)
    return PreparedRun(record, plan, specification, generated)


def _environment(request: LaunchRequest, cluster: Cluster | None) -> dict[str, str]:
    """What every rank gets in its environment: of an imported hostfile, and of the options."""
    hostfile = cluster.hostfile if cluster is not None else None
    environment = rank_environment(hostfile) if hostfile is not None else {}
    if request.fast_synch:
        environment["MLX_METAL_FAST_SYNCH"] = "1"
    return environment


def _settings(choice: Choice, routes: Routes, specification: RunSpecification) -> dict[str, str]:
    """What the run sets beside what was asked for, in words."""
    settings = {"backend": f"{choice.backend}: {choice.reason}"}
    if routes.words:
        settings["addresses"] = "; ".join(routes.words)
    if choice.backend == "mpi" and routes.networks:
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
    plan: Plan,
    model_name: str,
    port: int,
    settings: dict[str, str],
) -> RunRecord:
    own = psutil.Process()
    return RunRecord(
        run_id=specification.run_id,
        # A path must mean the same to a command that is given in another folder.
        model=_seen_from_everywhere(request.model),
        model_name=model_name,
        state="starting",
        backend=specification.backend,
        strategy=plan.placement.strategy,
        context_length=plan.request.context_length,
        ranks=tuple(RankRecord(rank, name) for rank, name in enumerate(specification.nodes)),
        created=time.time(),
        host=request.host,
        port=port,
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
