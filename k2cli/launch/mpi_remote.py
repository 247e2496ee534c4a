"""The program that mpirun runs as ssh: ``python -m k2cli.launch.mpi_remote HOST COMMAND...``.

It runs ssh with k2's options, so that mpirun connects as k2 does and never asks for input. If a
node has Open MPI in another folder than this machine, it starts mpirun's daemon from that folder,
so the PATH of a command over ssh does not matter. The daemon also gets a private folder of its own
for its files. ``K2_MPI_PREFIXES`` (JSON) maps each node to the folder of its Open MPI, and
``K2_MPI_FOLDERS`` to that private folder; "" is this machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import msgspec

from k2cli.files import decode_json
from k2cli.nodes.ssh_connection import connection_to

PREFIXES_VARIABLE = "K2_MPI_PREFIXES"
FOLDERS_VARIABLE = "K2_MPI_FOLDERS"


def daemon_command(
    words: Sequence[str], host: str, prefixes: Mapping[str, str], folders: Mapping[str, str]
) -> str:
    """Return mpirun's command for a node's shell, with our paths replaced by the node's."""
    command = " ".join(words)
    ours, theirs = prefixes.get("", ""), prefixes.get(host, "")
    if ours and theirs and ours != theirs:
        for follows in ("/bin", "/lib"):
            command = command.replace(f"{ours}{follows}", f"{theirs}{follows}")
    if "" in folders and host in folders:
        command = command.replace(folders[""], folders[host])
    return command


def split_host(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split off the host; mpirun may put options without values (``-x``) before it."""
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        rest.pop(0)
    if not rest:
        sys.exit("usage: python -m k2cli.launch.mpi_remote HOST COMMAND...")
    return rest[0], rest[1:]


def main() -> None:
    """Replace this process by ssh."""
    host, words = split_host(sys.argv[1:])
    try:
        prefixes, folders = (
            decode_json(os.environ.get(name, "{}"), type=dict[str, str])
            for name in (PREFIXES_VARIABLE, FOLDERS_VARIABLE)
        )
    except msgspec.DecodeError as error:
        sys.exit(f"{PREFIXES_VARIABLE} or {FOLDERS_VARIABLE} is not a table of folders: {error}")
    command = daemon_command(words, host, prefixes, folders)
    # The command is already quoted for the shell that ssh starts on the node.
    arguments = [*connection_to(host).command([])[:-1], command]
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main()
