"""The program that mpirun runs as ssh: ``python -m k2cli.launch.mpi_remote HOST COMMAND...``.

It runs ssh with k2's options, so that mpirun connects as k2 does and never asks for input. If a
node has Open MPI in another folder than this machine, it starts mpirun's daemon from that folder,
so the PATH of a command over ssh does not matter. ``K2_MPI_PREFIXES`` (JSON) maps each node to its
folder, and "" to that of this machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence

from k2cli.nodes.ssh_connection import connection_to

PREFIXES_VARIABLE = "K2_MPI_PREFIXES"


def daemon_command(words: Sequence[str], ours: str, theirs: str) -> str:
    """Return mpirun's command for a node's shell, with our prefix replaced by the node's."""
    command = " ".join(words)
    if ours and theirs and ours != theirs:
        for follows in ("/bin", "/lib"):
            command = command.replace(f"{ours}{follows}", f"{theirs}{follows}")
    return command


def split_host(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split off the host; mpirun may put options without values (``-x``) before it."""
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        rest.pop(0)
    return rest[0], rest[1:]


def main() -> None:
    """Replace this process by ssh."""
    host, words = split_host(sys.argv[1:])
    prefixes: Mapping[str, str] = json.loads(os.environ.get(PREFIXES_VARIABLE, "{}"))
    command = daemon_command(words, prefixes.get("", ""), prefixes.get(host, ""))
    # The command is already quoted for the shell that ssh starts on the node.
    arguments = [*connection_to(host).command([])[:-1], command]
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main()
