"""A slot of an MPI job: what mpirun starts in a rank's place.

A rank is the child of its guard, and guards are started the same way whatever the transport, so
that they outlive mpirun and restarts. What makes a process part of an MPI job is its environment:
the slot hands its own to the guard on the same node, which starts the rank with it, and then waits
until the guard lets it go.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from itertools import pairwise

import psutil

from k2cli.guard.mpi_slot import PARENT_NAME, slot_path
from k2cli.protocol.wire import frame
from k2cli.settings import RUN_OPTION

_RETRY_SECONDS = 0.05
_LOOK_SECONDS = 1.0
# Without a guard for so long, a slot leaves, and mpirun with it: with guard and launcher killed,
# nobody else would end them. A guard that comes at all is started at the same time.
_LIMIT_SECONDS = 20.0
_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "ORTE_", "OPAL_", "UCX_")
_NAMES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def job_environment() -> dict[str, str]:
    """What of this process's environment makes it part of the MPI job."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) or (name in _NAMES and value)
    }


def _guard_is_here(run_id: str, rank: int) -> bool:
    """Whether the guard of this rank lives on this machine."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            pairs = set(pairwise(command))
            # Of the processes of a rank only the guard is given a bootstrap.
            if {(RUN_OPTION, run_id), ("--rank", str(rank))} <= pairs and "--bootstrap" in command:
                return True
    return False


def _connect(run_id: str, rank: int) -> socket.socket:
    """Wait for the guard, as long as there is one, or may still come."""
    path = slot_path(run_id, rank)
    last_seen = looked = time.monotonic()
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            now = time.monotonic()
            if now - looked > _LOOK_SECONDS:
                looked = now
                last_seen = now if _guard_is_here(run_id, rank) else last_seen
            if now - last_seen > _LIMIT_SECONDS:
                sys.stderr.write(f"no guard waits at {path}: {error}\n")
                sys.exit(1)
            time.sleep(_RETRY_SECONDS)


def main() -> None:
    """Hand over the environment, and stay until the guard closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="k2cli.guard.mpi_slot_process")
    parser.add_argument(RUN_OPTION, dest="run", required=True, help="id of the run")
    parser.add_argument("--rank", required=True, type=int, help="the rank planned for this slot")
    options = parser.parse_args()
    number = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMIX_RANK", ""))
    if number != str(options.rank):
        sys.stderr.write(f"mpirun calls this process rank {number}, planned was {options.rank}\n")
        sys.exit(1)
    connection = _connect(options.run, options.rank)
    connection.sendall(frame({**job_environment(), PARENT_NAME: str(os.getppid())}))
    with contextlib.suppress(OSError):
        connection.recv(1)
    # What is not an MPI program leaves without MPI's farewell.
    os._exit(0)


if __name__ == "__main__":
    main()
