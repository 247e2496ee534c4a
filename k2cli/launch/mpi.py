"""Open MPI for a run: its libraries on the nodes, and mpirun with its way to reach nodes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2cli.agent.openmpi import find_libmpi, find_openmpi
from k2cli.errors import ClusterError
from k2cli.files import unwritable
from k2cli.launch.guard_commands import GuardCommand, mpi_command
from k2cli.launch.mpi_remote import FOLDERS_VARIABLE, PREFIXES_VARIABLE
from k2cli.nodes.node import Node
from k2cli.nodes.parallel import map_in_parallel
from k2cli.scratch import make_scratch


@dataclass(frozen=True, slots=True)
class Mpirun:
    """One mpirun to start: its command, variables to add to its environment, and its folder."""

    command: GuardCommand
    environment: Mapping[str, str]
    scratch: Path


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
                f"k2 cluster prepare --nodes {name}; or without it: --backend ring",
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
                f"k2 cluster prepare --nodes {name}; or without it: --backend ring",
            )
        if facts.mpi_major != mpi.major:
            raise ClusterError(
                f"node {name} has Open MPI {facts.mpi_major}, this machine {mpi.major}",
                "install the same major version on both; or without it: --backend ring",
            )
        found[name] = str(Path(facts.mpirun).parent.parent)
    return found


def prepare_mpirun(
    run_id: str,
    nodes: Sequence[Node],
    *,
    networks: Sequence[str] = (),
    prefixes: Mapping[str, str] | None = None,
) -> Mpirun:
    """Prepare one mpirun: make its folder here and those of its daemons on other nodes.

    Args:
        run_id: the run.
        nodes: one per rank.
        networks: those that MPI may use between machines.
        prefixes: see ``find_prefixes``; None if all ranks are on this machine.

    Raises:
        ClusterError: if there is no Open MPI here, or a folder cannot be made or written.
    """
    mpi = find_openmpi()
    scratch = make_scratch(run_id)
    try:
        environment = {}
        if prefixes is not None:
            folders = {"": str(scratch), **_daemon_folders(run_id, nodes)}
            environment = _remote_environment(scratch, prefixes, folders)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise unwritable(error, scratch, ClusterError) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    command = mpi_command(run_id, nodes, mpi, scratch, networks=networks)
    return Mpirun(command, environment, scratch)


def _daemon_folders(run_id: str, nodes: Sequence[Node]) -> dict[str, str]:
    """Make a folder for mpirun's daemon on each other node.

    mpirun would use the path of its own folder there, which other users could have seen on its
    command line and made first.
    """
    remote = list({node.name: node for node in nodes if not node.is_local}.values())
    made = map_in_parallel(lambda node: node.ask(str, "make-scratch", run_id), remote)
    return dict(zip((node.name for node in remote), made, strict=True))


def _remote_environment(
    scratch: Path, prefixes: Mapping[str, str], folders: Mapping[str, str]
) -> dict[str, str]:
    """Write a program named ssh into ``scratch``, and return the variables to find it.

    mpirun must find it by name on the PATH: its daemons on the nodes also look for a program that
    is given as a path, and fail without it.
    """
    own_path = os.environ.get("PATH", os.defpath)
    program = shlex.join([sys.executable, "-P", "-m", "k2cli.launch.mpi_remote"])
    # The program itself must find the system's ssh.
    text = f'#!/bin/sh\nPATH={shlex.quote(own_path)}\nexport PATH\nexec {program} "$@"\n'
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(scratch / "ssh", flags, 0o700), "w") as file:
        file.write(text)
    return {
        "PATH": f"{scratch}{os.pathsep}{own_path}",
        PREFIXES_VARIABLE: json.dumps(dict(prefixes)),
        FOLDERS_VARIABLE: json.dumps(dict(folders)),
    }
