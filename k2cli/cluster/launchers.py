"""Launcher back ends: what to start where so that every rank has its guard.

``local`` and ``ring`` start each guard directly on its node; ``mpi`` lets mpirun start them all.
Either way the first process carries the conversation with the leader's guard on its stdin and
stdout. Nothing here starts anything: command lines out, decided from values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2cli.cluster.nodes import Node
from k2cli.cluster.openmpi import OpenMpi, find_mpirun, mpirun_arguments
from k2cli.errors import UsageError

Backend = Literal["local", "mpi", "ring"]
DEFAULT_WORKER = "k2cli.runtime.worker"
BOOTSTRAP_NAME = "bootstrap-{rank}.json"


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


def choose_backend(wanted: str, nodes: Sequence[Node]) -> Backend:
    """Resolve ``auto``: no back end for one rank, MPI where there is an mpirun, else the ring.

    Raises:
        UsageError: if the back end wanted cannot start that many ranks, or does not exist.
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
        case "mpi" | "ring":
            # A group of one needs no back end, and MPI none of its trouble.
            return wanted if len(nodes) > 1 else "local"
        case _:
            raise UsageError(f"--backend '{wanted}' is none of auto, local, mpi, ring")


def guard_arguments(
    run_id: str, rank: int | None, worker: str = DEFAULT_WORKER, python: str = sys.executable
) -> list[str]:
    """The command line of a guard; under mpirun it learns its rank from there."""
    arguments = [python, "-P", "-m", "k2cli.runtime.guard", "--run", run_id]
    arguments += ["--bootstrap", BOOTSTRAP_NAME]
    if rank is not None:
        arguments += ["--rank", str(rank)]
    if worker != DEFAULT_WORKER:
        arguments += ["--worker-module", worker]
    return arguments


def direct_commands(
    run_id: str, nodes: Sequence[Node], worker: str = DEFAULT_WORKER
) -> list[GuardCommand]:
    """One guard per rank, each started on its own node."""
    return [
        GuardCommand(node.name, (rank,), tuple(guard_arguments(run_id, rank, worker)))
        for rank, node in enumerate(nodes)
    ]


def mpi_commands(
    run_id: str, nodes: Sequence[Node], mpi: OpenMpi, scratch: Path, worker: str = DEFAULT_WORKER
) -> list[GuardCommand]:
    """One mpirun on this machine for all guards.

    Raises:
        UsageError: if a name repeats with others between: mpirun numbers ranks node by node.
    """
    names = [node.name for node in nodes]
    if names != sorted(names, key=names.index):
        raise UsageError(
            f"with --backend mpi a repeated node stands beside itself, unlike in {','.join(names)}",
            f"--nodes {','.join(sorted(names, key=names.index))}",
        )
    hosts = None if all(node.is_local for node in nodes) else names
    is_root = os.geteuid() == 0
    before = mpirun_arguments(mpi, hosts, len(nodes), scratch, is_root=is_root)
    arguments = (*before, *guard_arguments(run_id, None, worker))
    return [GuardCommand("localhost", tuple(range(len(nodes))), arguments)]
