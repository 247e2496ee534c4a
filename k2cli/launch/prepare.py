"""Prepare a run: decide everything about it, take its machines, and write its folder.

Every error that can be found before a process of the run exists is found here.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

import psutil

from k2cli.access.tls_files import expiry_date
from k2cli.agent.activity import start_of
from k2cli.agent.run_folder import make_reserve, run_folder, write_private
from k2cli.cluster.description import load_cluster
from k2cli.cluster.hostfile import rank_environment
from k2cli.cluster.node_lookup import node_named
from k2cli.errors import DoesNotFitError, UsageError
from k2cli.files import unwritable
from k2cli.launch.endpoint import check_tls, choose_endpoint, choose_keys, key_setting
from k2cli.launch.fetch import fetch_lacking
from k2cli.launch.gpus import gpus_in, machines_of, place_plan
from k2cli.launch.model_copies import examine_copies, find_model_copies
from k2cli.launch.model_source import locate_model
from k2cli.launch.mpi import find_libraries, find_prefixes
from k2cli.launch.plan import (
    check_plan,
    plan_with_transport,
    read_given_plan,
    transport_of_placed,
)
from k2cli.launch.prefix_disk import disk_setting, disk_warnings
from k2cli.launch.request import LaunchRequest, checked_request
from k2cli.launch.routes import find_routes
from k2cli.launch.specification import (
    RunDecisions,
    link_check_of,
    make_specification,
    save_specification,
)
from k2cli.launch.transport import check_nodes
from k2cli.models.part import absent_files
from k2cli.models.reference import is_path
from k2cli.nodes.locks import RankNeed, Say, release_locks, take_locks
from k2cli.nodes.node import LOCALHOST
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.plan import plan_to_json
from k2cli.runs.record import RankRecord, RunRecord, new_run_id, prune_records, save_record
from k2cli.transfer.choose_push import portable_reference
from k2cli.transfer.request import OnPushEvent
from k2cli.units import format_bytes


def prepare_run(
    request: LaunchRequest,
    say: Say = lambda text: None,
    on_fetch: OnPushEvent = lambda event: None,
) -> RunDecisions:
    """Decide everything about a run, take its machines, and write its folder.

    Args:
        request: what the user asked for.
        say: receives warnings, and the reason for each wait.
        on_fetch: receives the progress of bringing weights to nodes.

    Raises:
        UsageError: if the request contradicts itself or names something unknown.
        DoesNotFitError: if the plan does not fit and ``force`` is not set.
        ClusterError: if a node cannot be reached, fails a check, or is in use by another run.
        K2Error: if the model is neither here nor on the first node, or the port is taken.
    """
    run = RunDecisions(checked_request(request))
    choose_keys(run)
    _choose_nodes(run)
    check_tls(run)
    with locate_model(request.model, run.nodes, fetch=request.fetch) as run.model:
        _choose_transport(run, say)
        _make_plan(run, say)
        _find_model_copies(run, on_fetch)
        _choose_routes(run)
        _choose_names(run)
        _take_locks(run, say, on_fetch)
    try:
        for text in disk_warnings(run):
            say(f"warning: {text}")
        choose_endpoint(run)
        _choose_environments(run)
        _write_folder(run)
    except BaseException:
        _undo(run)
        raise
    return run


# --- steps, in the order in which they run ------------------------------------------------------


def _choose_nodes(run: RunDecisions) -> None:
    """Read the plan file and the cluster that the request names, and choose one node per rank."""
    run.plan_given = read_given_plan(run.request)
    run.cluster = None
    if run.request.cluster is not None:
        run.cluster = load_cluster(run.request.cluster)
    run.nodes = [node_named(name) for name in _node_names(run)]


def _choose_transport(run: RunDecisions, say: Say) -> None:
    """Check the nodes, and choose the transport by what they have."""
    run.wanted_transport = check_nodes(
        run.nodes,
        run.request.transport,
        say,
        force=run.request.force,
        parallel=run.request.parallel
        if run.plan_given is None
        else run.plan_given.placement.strategy,
    )


def _make_plan(run: RunDecisions, say: Say) -> None:
    """Make the plan unless the user gave one, and refuse one that does not fit."""
    try:
        _plan_for(run, say)
    except DoesNotFitError:
        if not run.request.wait_seconds or not any(each.gpus for each in run.machines):
            raise
        # It may fit on a GPU of another run, whose end the launch may wait for.
        _plan_for(run, say, as_if_ended=True)


def _plan_for(run: RunDecisions, say: Say, *, as_if_ended: bool = False) -> None:
    """Plan for the GPUs that are free, or as if the other runs had ended."""
    folder, force = run.model.folder, run.request.force
    run.transport, run.transport_reason = run.wanted_transport
    run.machines = ()
    if run.plan_given is None:
        run.machines = machines_of(run.nodes, run.request, say, as_if_ended=as_if_ended)
        run.plan, run.transport, run.transport_reason = plan_with_transport(
            run.request, folder, run.machines, run.transport, run.transport_reason, say
        )
        check_plan(run.plan, folder, run.nodes, force=force)
        return
    run.plan = run.plan_given
    check_plan(run.plan, folder, run.nodes, force=force)
    if any(node.backend == "cuda" for node in run.plan.nodes):
        run.machines = machines_of(run.nodes, run.request, say, as_if_ended=as_if_ended)
        run.plan = place_plan(run.plan, run.machines, force=force)
        run.transport, run.transport_reason = transport_of_placed(
            run.request, run.plan, run.transport, run.transport_reason
        )


def _find_model_copies(run: RunDecisions, on_fetch: OnPushEvent) -> None:
    """Find the folder of the model on each node, and bring there what is missing if so asked."""
    if all(node.is_local for node in run.nodes) and not absent_files(run.model.folder):
        run.model_folders = {node.name: str(run.model.folder) for node in run.nodes}
        return
    reference, placement = portable_reference(run.request.model), run.plan.placement
    if run.request.fetch:
        copies = examine_copies(run.nodes, reference, run.model, placement)
        if copies.lacking:
            fetch_lacking(run.nodes, reference, run.model, copies, run.cluster, on_fetch)
    run.model_folders = find_model_copies(run.nodes, reference, run.model, placement)


def _choose_routes(run: RunDecisions) -> None:
    """Choose the addresses by which the ranks reach each other."""
    run.routes = find_routes(run.nodes, run.transport, run.cluster)


def _choose_names(run: RunDecisions) -> None:
    """Choose the run's id, and the name that clients call the model: a path's last part."""
    reference = run.request.model
    run.model_name = run.model.folder.name if is_path(reference) else reference
    run.run_id = new_run_id(run.model_name)


def _take_locks(run: RunDecisions, say: Say, on_fetch: OnPushEvent) -> None:
    """Take the lock of each node, with the bytes and the GPUs that each rank needs there."""
    refused: list[Sequence[NodeMemory]] = []
    take_locks(
        run.nodes,
        run.run_id,
        _needs(run),
        model=portable_reference(run.request.model),
        folders=run.model_folders,
        share=run.request.share,
        wait_seconds=run.request.wait_seconds,
        say=say,
        choose_again=lambda: _choose_again(run, on_fetch, refused),
    )


def _needs(run: RunDecisions) -> dict[str, list[RankNeed]]:
    needs: dict[str, list[RankNeed]] = {}
    for node, budget in zip(run.nodes, run.plan.nodes, strict=True):
        need = RankNeed(budget.total_bytes, budget.limit_bytes, budget.gpu, budget.memory_bytes)
        needs.setdefault(node.name, []).append(need)
    return needs


def _choose_again(
    run: RunDecisions, on_fetch: OnPushEvent, refused: list[Sequence[NodeMemory]]
) -> dict[str, list[RankNeed]] | None:
    """Plan anew if other GPUs are free now than when the plan was made; None if not.

    Another launch may have been faster to lock a GPU that both have chosen, and while this one
    waits for one GPU another may become free. ``refused`` has the machines for which no plan fits.
    """
    if not any(machine.gpus for machine in run.machines):
        return None
    machines = machines_of(run.nodes, run.request)
    if gpus_in(machines) == gpus_in(run.machines) or machines in refused:
        return None
    before = run.machines, run.plan, run.transport, run.transport_reason
    try:
        _plan_for(run, lambda text: None)
    except (DoesNotFitError, UsageError):
        # It waits for the GPUs of its plan, or the error names who holds them.
        run.machines, run.plan, run.transport, run.transport_reason = before
        refused[:] = [machines]
        return None
    _find_model_copies(run, on_fetch)
    _choose_routes(run)
    return _needs(run)


def _choose_environments(run: RunDecisions) -> None:
    """Collect the environment variables of the ranks: of an imported hostfile, options and MPI."""
    common: dict[str, str] = {}
    if run.cluster is not None and run.cluster.hostfile is not None:
        common |= rank_environment(run.cluster.hostfile)
    if run.request.fast_synch:
        common["MLX_METAL_FAST_SYNCH"] = "1"
    run.environments = {node.name: dict(common) for node in run.nodes}
    run.mpi_prefixes = {}
    if run.transport == "mpi":
        for name, library in find_libraries(run.nodes).items():
            run.environments[name]["MLX_MPI_LIBNAME"] = library
        run.mpi_prefixes = find_prefixes(run.nodes)


def _write_folder(run: RunDecisions) -> None:
    """Write the run's folder: plan, API key, specification and record."""
    prune_records()
    folder = run_folder(run.run_id)
    try:
        make_reserve(run.run_id)
        write_private(run.run_id, "plan.json", plan_to_json(run.plan))
        if run.http.api_key is not None:
            write_private(run.run_id, "api-key", run.http.api_key.encode())
        save_specification(make_specification(run))
        run.record = _make_record(run)
        save_record(run.record)
    except OSError as error:
        raise unwritable(error, folder) from error


def _undo(run: RunDecisions) -> None:
    """Remove what was written, and release the locks."""
    shutil.rmtree(run_folder(run.run_id), ignore_errors=True)
    release_locks(run.nodes, run.run_id)


# --- details ------------------------------------------------------------------------------------


def _node_names(run: RunDecisions) -> Sequence[str]:
    """Return the nodes of ``--nodes``, else those of the cluster or the plan, else this machine.

    Raises:
        UsageError: if a name is invalid, or the plan is for machines of the catalog.
    """
    if run.request.nodes is not None:
        if not all(run.request.nodes):
            raise UsageError(
                f"--nodes '{','.join(run.request.nodes)}' has an empty name",
                f"--nodes {','.join(filter(None, run.request.nodes)) or 'localhost'}",
            )
        if odd := [name for name in run.request.nodes if name.startswith("-") or " " in name]:
            raise UsageError(f"'{odd[0]}' is not a valid name of a node")
        return run.request.nodes
    if run.cluster is not None:
        return [node.name for node in run.cluster.rank_nodes]
    if run.plan_given is None:
        return [LOCALHOST]
    names = [part.node for part in run.plan_given.placement.ranks]
    if any("/" in name for name in names):
        # Names such as m3-ultra-512/1 are machines of the catalog.
        raise UsageError(
            f"the plan is for {', '.join(names)}, which are machines of the catalog",
            f"--nodes {','.join([LOCALHOST] * len(names))}",
        )
    return names


def _make_record(run: RunDecisions) -> RunRecord:
    own = psutil.Process()
    return RunRecord(
        run_id=run.run_id,
        # A path must mean the same to a command that is given in another folder.
        model=portable_reference(run.request.model),
        model_name=run.model_name,
        state="starting",
        backend=run.transport,
        strategy=run.plan.placement.strategy,
        context_length=run.plan.request.context_length,
        ranks=tuple(
            RankRecord(rank, node.name, gpu=budget.gpu)
            for rank, (node, budget) in enumerate(zip(run.nodes, run.plan.nodes, strict=True))
        ),
        created=time.time(),
        host=run.request.host,
        port=run.http.port,
        # Until a supervisor takes over, this process answers for the run.
        pid=own.pid,
        pid_create_time=own.create_time(),
        pid_start=start_of(own.pid),
        restart=run.request.restart.mode,
        settings=_settings(run),
        model_folders=dict(run.model_folders),
        ends_with_chats=run.request.ends_with_chats,
        ends_with_check=run.request.ends_with_check,
    )


def _settings(run: RunDecisions) -> dict[str, str]:
    """Describe the settings that k2 chose itself, and options of the API, by name."""
    settings = {"backend": f"{run.transport}: {run.transport_reason}"}
    if run.routes.interfaces:
        settings["addresses"] = "; ".join(run.routes.interfaces)
    if run.transport == "mpi" and run.routes.networks:
        settings["btl_tcp_if_include"] = ",".join(run.routes.networks)
    if run.routes.nccl is not None:
        settings["nccl"] = f"{run.routes.nccl.host}, interface {run.routes.nccl.interfaces[0]}"
    if run.routes.rdma is not None:
        settings["rdma devices"] = str(run.routes.rdma)
    if (check := link_check_of(run)) is not None:
        tokens = min(max(check.tokens), run.plan.request.context_length - 1)
        settings["link check"] = (
            f"prompt of {tokens:,} tokens, computed twice, as far as {check.seconds:.0f} s suffice"
        )
    settings |= run.environments[run.nodes[0].name]
    if sys.platform == "darwin" and any(node.is_local for node in run.nodes):
        settings["wired memory"] = f"{format_bytes(run.plan.nodes[0].weights_bytes)} of weights"
    if run.http.api_key is not None:
        settings["named keys"] = key_setting(run)
    if run.tls is not None:
        names = ", ".join(run.tls.names) or "no name"
        settings["tls certificate"] = f"for {names}; valid until {expiry_date(run.tls)}"
    if run.request.prefix_disk_bytes:
        settings["prefix cache on disk"] = disk_setting(run)
    if run.http.aliases:
        settings["aliases"] = ", ".join(run.http.aliases)
    if run.http.tool_parser is not None:
        settings["tool parser"] = run.http.tool_parser
    if run.http.reasoning_parser is not None:
        settings["reasoning parser"] = run.http.reasoning_parser
    return settings
