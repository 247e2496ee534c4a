"""Makes an mpirun ready to start: its folder, and the program by which it reaches other nodes."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from k2cli.agent.openmpi import find_openmpi
from k2cli.errors import ClusterError
from k2cli.launch.guard_commands import GuardCommand, mpi_command
from k2cli.launch.mpi_remote import PREFIXES_VARIABLE
from k2cli.nodes.node import Node


def prepare_mpirun(
    run_id: str,
    nodes: Sequence[Node],
    scratch: Path,
    *,
    networks: Sequence[str] = (),
    prefixes: Mapping[str, str] | None = None,
) -> tuple[GuardCommand, dict[str, str]]:
    """The command, and what it needs in its environment beside this process's own.

    Args:
        run_id: the run.
        nodes: one per rank.
        scratch: its folder, made if it is not there.
        networks: that MPI may use between machines.
        prefixes: where each node has its Open MPI; None if all ranks are on this machine.

    Raises:
        ClusterError: if there is no Open MPI here, or the folder cannot be written.
    """
    mpi = find_openmpi()
    try:
        scratch.mkdir(mode=0o700, exist_ok=True)
        environment = {} if prefixes is None else remote_environment(scratch, prefixes)
    except OSError as error:
        raise ClusterError(f"mpirun's folder cannot be written: {error}") from error
    return mpi_command(run_id, nodes, mpi, scratch, networks=networks), environment


def remote_environment(scratch: Path, prefixes: Mapping[str, str]) -> dict[str, str]:
    """Make a program in ``scratch`` that mpirun takes for ssh; what mpirun needs to find it.

    By its name on the PATH: a path given to mpirun is looked for by its daemons on the nodes too,
    which fail without it.

    Raises:
        OSError: if the folder cannot be written.
    """
    own_path = os.environ.get("PATH", os.defpath)
    program = shlex.join([sys.executable, "-P", "-m", "k2cli.launch.mpi_remote"])
    path = scratch / "ssh"
    # The program itself must find the system's ssh.
    path.write_text(f'#!/bin/sh\nPATH={shlex.quote(own_path)}\nexport PATH\nexec {program} "$@"\n')
    path.chmod(0o700)
    found = f"{scratch}{os.pathsep}{own_path}"
    return {"PATH": found, PREFIXES_VARIABLE: json.dumps(dict(prefixes))}
