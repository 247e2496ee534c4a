"""Build the command lines of the guards and of mpirun.

Guards are started the same way for every transport: directly on their nodes. ``mpi`` adds an
mpirun, whose processes (``guard.mpi_slot_process``) hand their MPI slots to the guards. So neither
a guard nor its connection to the supervisor nor the API's port depends on mpirun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2cli.agent.openmpi import OpenMpi, mpirun_arguments
from k2cli.agent.run_processes import MPI_SETTING
from k2cli.launch.request import DEFAULT_WORKER
from k2cli.nodes.node import Node
from k2cli.settings import RUN_OPTION

BOOTSTRAP_NAME = "bootstrap-{rank}.json"
# mpirun runs on the machine of the launcher.
MPIRUN_NODE = "localhost"


@dataclass(frozen=True, slots=True)
class GuardCommand:
    """The command line of a guard, with its rank, or of mpirun, without ranks."""

    node: str
    ranks: tuple[int, ...]
    arguments: tuple[str, ...]

    @property
    def program(self) -> str:
        """The process's name in error messages."""
        return "mpirun" if Path(self.arguments[0]).name == "mpirun" else "the guard"


def guard_arguments(
    run_id: str, rank: int, worker: str = DEFAULT_WORKER, python: str = sys.executable
) -> list[str]:
    """Return the command line of a guard."""
    arguments = [python, "-P", "-m", "k2cli.guard.main", RUN_OPTION, run_id]
    arguments += ["--bootstrap", BOOTSTRAP_NAME, "--rank", str(rank)]
    if worker != DEFAULT_WORKER:
        arguments += ["--worker-module", worker]
    return arguments


def direct_commands(
    run_id: str, nodes: Sequence[Node], worker: str = DEFAULT_WORKER
) -> list[GuardCommand]:
    """Return one guard command per rank, each for the Python of its node."""
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
    """Return the command of the mpirun on this machine that gives every rank its MPI slot.

    Args:
        run_id: the run.
        nodes: one per rank; mpirun numbers its processes in this order.
        mpi: the Open MPI of this machine.
        scratch: a folder with a short path for mpirun's files.
        networks: those that ranks may use between nodes (``10.0.0.0/24``); empty for any.
    """
    is_remote = not all(node.is_local for node in nodes)
    arguments = mpirun_arguments(
        mpi, scratch, remote=is_remote, networks=networks, is_root=os.geteuid() == 0
    )
    # mpirun passes this on to its daemons, whose command lines then name the run.
    arguments += ["--prtemca" if mpi.major >= 5 else "--mca", MPI_SETTING, run_id]
    for rank, node in enumerate(nodes):
        if rank > 0:
            arguments.append(":")
        arguments += ["-np", "1"]
        if is_remote:
            arguments += ["--host", node.name]
        # The path of Python may differ from machine to machine.
        arguments += [node.python, "-P", "-m", "k2cli.guard.mpi_slot_process"]
        arguments += [RUN_OPTION, run_id, "--rank", str(rank)]
    return GuardCommand(MPIRUN_NODE, (), tuple(arguments))
