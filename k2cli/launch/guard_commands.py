"""Command lines that start every rank's guard, and mpirun.

Guards are started the same way for every transport: directly on their nodes. ``mpi`` adds an
mpirun, whose processes (``runtime.seat``) hand their places in the MPI job to the guards; so a
guard, its conversation with the launcher and the API's port do not hang on mpirun. Nothing here
starts anything: command lines out, decided from values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2cli.agent.openmpi import OpenMpi, find_mpirun, mpirun_arguments
from k2cli.agent.run_processes import MPI_SETTING
from k2cli.choices import Transport, WantedTransport
from k2cli.errors import UsageError
from k2cli.nodes.node import Node
from k2cli.settings import RUN_OPTION

DEFAULT_WORKER = "k2cli.rank.main"
BOOTSTRAP_NAME = "bootstrap-{rank}.json"
# mpirun runs where the launcher does.
MPIRUN_NODE = "localhost"


@dataclass(frozen=True, slots=True)
class GuardCommand:
    """One process for the launcher to start, and the ranks whose guards it brings up."""

    node: str
    ranks: tuple[int, ...]
    arguments: tuple[str, ...]

    @property
    def program(self) -> str:
        """What to call the process when it fails."""
        return "mpirun" if Path(self.arguments[0]).name == "mpirun" else "the guard"


def choose_transport(wanted: WantedTransport, nodes: Sequence[Node]) -> Transport:
    """Resolve ``auto``: ``local`` for one rank, MPI where there is an mpirun, else the ring.

    Raises:
        UsageError: if the transport wanted cannot start that many ranks.
    """
    match wanted:
        case "auto":
            if len(nodes) == 1:
                return "local"
            return "mpi" if find_mpirun() is not None else "ring"
        case "local":
            if len(nodes) > 1:
                raise UsageError(
                    f"--backend local starts one rank, not {len(nodes)}", "--backend ring"
                )
            return "local"
        case "mpi" | "ring" | "jaccl":
            # A group of one needs no transport, and MPI none of its trouble.
            return wanted if len(nodes) > 1 else "local"


def guard_arguments(
    run_id: str, rank: int, worker: str = DEFAULT_WORKER, python: str = sys.executable
) -> list[str]:
    """The command line of a guard."""
    arguments = [python, "-P", "-m", "k2cli.guard.main", RUN_OPTION, run_id]
    arguments += ["--bootstrap", BOOTSTRAP_NAME, "--rank", str(rank)]
    if worker != DEFAULT_WORKER:
        arguments += ["--worker-module", worker]
    return arguments


def direct_commands(
    run_id: str, nodes: Sequence[Node], worker: str = DEFAULT_WORKER
) -> list[GuardCommand]:
    """One guard per rank, each started on its own node by that node's Python."""
    return [
        GuardCommand(node.name, (rank,), tuple(guard_arguments(run_id, rank, worker, node.python)))
        for rank, node in enumerate(nodes)
    ]


def mpi_command(
    run_id: str,
    nodes: Sequence[Node],
    mpi: OpenMpi,
    scratch: Path,
    *,
    networks: Sequence[str] = (),
) -> GuardCommand:
    """The mpirun on this machine that gives every rank its place in the MPI job.

    Args:
        run_id: the run.
        nodes: one per rank; mpirun numbers its processes in this order.
        mpi: the one found.
        scratch: a folder with a short path for its files.
        networks: ``10.0.0.0/24``, ...: what ranks may use between nodes; empty for any.
    """
    is_remote = not all(node.is_local for node in nodes)
    arguments = mpirun_arguments(
        mpi, scratch, remote=is_remote, networks=networks, is_root=os.geteuid() == 0
    )
    # mpirun passes it on: the mark of the run on its daemons' command lines.
    arguments += ["--prtemca" if mpi.major >= 5 else "--mca", MPI_SETTING, run_id]
    for rank, node in enumerate(nodes):
        if rank > 0:
            arguments.append(":")
        arguments += ["-np", "1"]
        if is_remote:
            arguments += ["--host", node.name]
        # Each node's own Python: paths may differ from machine to machine.
        arguments += [node.python, "-P", "-m", "k2cli.guard.mpi_slot_process"]
        arguments += [RUN_OPTION, run_id, "--rank", str(rank)]
    return GuardCommand(MPIRUN_NODE, (), tuple(arguments))
