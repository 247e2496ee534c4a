"""How mpirun reaches another node: ``python -m k2cli.launch.mpi_remote HOST COMMAND...``.

mpirun starts its daemon on each node through a program that it takes for ssh. This one is ssh with
k2's options, so that mpirun connects as k2 does and never asks anything; and where a node has its
Open MPI in another place than this machine (``K2_MPI_PREFIXES``: JSON, node to prefix, our own
under ""), the daemon is started from there, whatever the PATH of a command over ssh is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence

PREFIXES_VARIABLE = "K2_MPI_PREFIXES"


def daemon_command(words: Sequence[str], ours: str, theirs: str) -> str:
    """mpirun's command for a node's shell, with its own prefix replaced by that of the node."""
    command = " ".join(words)
    if ours and theirs and ours != theirs:
        for follows in ("/bin", "/lib"):
            command = command.replace(f"{ours}{follows}", f"{theirs}{follows}")
    return command


def split_host(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The host and the command: mpirun puts options such as ``-x`` before the host, at most."""
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        rest.pop(0)
    return rest[0], rest[1:]


def main() -> None:
    """Become ssh."""
    from k2cli.nodes.ssh_connection import connection_to

    host, words = split_host(sys.argv[1:])
    prefixes: Mapping[str, str] = json.loads(os.environ.get(PREFIXES_VARIABLE, "{}"))
    command = daemon_command(words, prefixes.get("", ""), prefixes.get(host, ""))
    # Already words for a shell, the one that ssh would have given them to.
    arguments = [*connection_to(host).command([])[:-1], command]
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main()
