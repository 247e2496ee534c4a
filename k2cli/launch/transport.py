"""Check the nodes of a launch with the doctor's quick checks, and choose the transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from k2cli.agent.openmpi import find_mpirun, find_openmpi
from k2cli.choices import Parallel, Transport, WantedTransport
from k2cli.errors import ClusterError, UsageError
from k2cli.launch.nccl import REASON, check_nccl, suits_nccl
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.nodes.node import Node
from k2cli.rdma_launches import SAFE_LAUNCHES


def check_nodes(
    nodes: Sequence[Node],
    wanted: WantedTransport,
    say: Callable[[str], None],
    *,
    force: bool,
    parallel: Parallel = "auto",
) -> tuple[Transport, str]:
    """Check the nodes of a launch, and return its transport and the reason for it.

    If all nodes are this machine, the checks are skipped: the plan looks at its memory, and no
    other check of the doctor can prevent such a launch.

    Raises:
        UsageError: if the wanted transport cannot connect these ranks.
        ClusterError: if a check fails and ``force`` is not set; other findings go to ``say``.
    """
    basic = choose_transport(wanted, nodes, parallel)
    if all(node.is_local for node in nodes):
        transport, reason = basic, _basic_reason(wanted, basic)
    else:
        transport, reason = _examine(nodes, wanted, basic, say, force=force)
    if transport == "mpi":
        find_openmpi()
    return transport, reason


def restart_warnings(transport: Transport, restart: RestartPolicy) -> list[str]:
    """Return what restarts may cost over a transport."""
    if transport != "jaccl" or restart.mode == "never":
        return []
    return [
        f"each start by --restart on-failure is one more launch over JACCL on every node, and more "
        f"than {SAFE_LAUNCHES} may need a restart of the machines; k2 doctor shows the number"
    ]


def choose_transport(
    wanted: WantedTransport, nodes: Sequence[Node], parallel: Parallel = "auto"
) -> Transport:
    """Resolve ``auto``: one rank needs none; then NCCL for GPUs of one machine, MPI, the ring.

    Raises:
        UsageError: if the wanted transport cannot connect these ranks.
    """
    match wanted:
        case "auto":
            if len(nodes) == 1:
                return "local"
            if suits_nccl(nodes, parallel):
                return "nccl"
            return "mpi" if find_mpirun() is not None else "ring"
        case "local":
            if len(nodes) > 1:
                raise UsageError(
                    f"--backend local starts one rank, not {len(nodes)}", "--backend ring"
                )
            return "local"
        case "mpi" | "ring" | "jaccl" | "nccl":
            if wanted == "nccl" and len(nodes) > 1:
                check_nccl(nodes, parallel)
            # One rank needs no transport.
            return wanted if len(nodes) > 1 else "local"


def _basic_reason(wanted: WantedTransport, transport: Transport) -> str:
    if transport == "local":
        unused = "" if wanted in ("auto", "local") else f", so --backend {wanted} is not used"
        return f"one rank needs no transport{unused}"
    if wanted != "auto":
        return "asked for"
    if transport == "nccl":
        return REASON
    return "mpirun is here" if transport == "mpi" else "there is no mpirun"


def _examine(
    nodes: Sequence[Node],
    wanted: WantedTransport,
    basic: Transport,
    say: Callable[[str], None],
    *,
    force: bool,
) -> tuple[Transport, str]:
    from k2cli.doctor.examination import ExaminationOptions, examine_nodes

    distinct = list({node.name: node for node in nodes}.values())
    report = examine_nodes(distinct, ExaminationOptions(quick=True, transport=wanted))
    for result in report.results:
        if result.name == "mpirun":
            continue  # checks the mpirun on each node's PATH; a launch finds the node's own
        where = f" on {result.node}" if result.node else ""
        text = f"{result.name}{where}: {result.detail}"
        if result.status == "fail" and not force:
            raise ClusterError(text, result.hint)
        if result.status in ("fail", "warn"):
            say(f"warning: {text}" + (f" ({result.hint})" if result.hint else ""))
    advice = report.recommendation
    if (
        basic == "local"
        or wanted != "auto"
        or advice is None
        or advice.backend not in ("mpi", "ring", "jaccl")
    ):
        return basic, _basic_reason(wanted, basic)
    if advice.backend == "mpi" and find_mpirun() is None:
        return "ring", "the nodes have Open MPI, but there is no mpirun on this machine"
    return choose_transport(advice.backend, nodes), advice.reason
