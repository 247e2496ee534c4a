"""The process that mpirun starts in place of a rank; it occupies the rank's slot in the MPI job.

A rank is a child of its guard. Guards are started in the same way for every transport, so that they
outlive mpirun and restarts. The environment of a process makes it part of an MPI job: this process
sends its own to the guard on the same node, which starts the rank with it. Then this process waits
until the guard closes the connection.
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

from k2cli.guard.mpi_slot import PARENT_NAME, slot_name
from k2cli.pauses import PauseAwareClock
from k2cli.protocol.wire import frame
from k2cli.scratch import find_scratch
from k2cli.settings import RUN_OPTION
from k2cli.stderr import say_on_stderr
from k2cli.system.processes import command_of

_RETRY_SECONDS = 0.05
_LOOK_SECONDS = 1.0
# A slot process without a guard exits after this time, and mpirun with it: if guard and launcher
# were killed, nothing else would end them. A guard is started at the same time as mpirun.
_LIMIT_SECONDS = 20.0
_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "ORTE_", "OPAL_", "UCX_")
_NAMES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def job_environment() -> dict[str, str]:
    """Return the environment variables that make this process part of the MPI job."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) or (name in _NAMES and value)
    }


def _guard_is_here(run_id: str, rank: int) -> bool:
    """Return True if the guard of this rank runs on this machine."""
    for process in psutil.process_iter():
        command = command_of(process)
        pairs = set(pairwise(command))
        # Only the guard of a rank has the option --bootstrap.
        if {(RUN_OPTION, run_id), ("--rank", str(rank))} <= pairs and "--bootstrap" in command:
            return True
    return False


def _try_sockets(run_id: str, rank: int) -> socket.socket | None:
    """Connect to the guard's socket, which is in one of the run's private folders here."""
    for folder in find_scratch(run_id):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(folder / slot_name(rank)))
            return connection
        except OSError:  # the folder of another guard, of mpirun, or of an earlier attempt
            connection.close()
    return None


def _connect(run_id: str, rank: int) -> socket.socket:
    """Connect to the guard. Exit if there is no guard for ``_LIMIT_SECONDS``."""
    clock = PauseAwareClock()
    last_seen = looked = clock.now()
    while (connection := _try_sockets(run_id, rank)) is None:
        now = clock.now()
        if now - looked > _LOOK_SECONDS:
            looked = now
            last_seen = now if _guard_is_here(run_id, rank) else last_seen
        if now - last_seen > _LIMIT_SECONDS:
            say_on_stderr(f"no guard listens for the slot of rank {rank} of {run_id}")
            sys.exit(1)
        time.sleep(_RETRY_SECONDS)
    return connection


def main() -> None:
    """Send the environment to the guard, and wait until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="k2cli.guard.mpi_slot_process")
    parser.add_argument(RUN_OPTION, dest="run", required=True, help="id of the run")
    parser.add_argument("--rank", required=True, type=int, help="the rank planned for this slot")
    options = parser.parse_args()
    number = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMIX_RANK", ""))
    if number != str(options.rank):
        say_on_stderr(f"mpirun gave this process rank {number} instead of {options.rank}")
        sys.exit(1)
    connection = _connect(options.run, options.rank)
    with contextlib.suppress(OSError):  # the guard may end at any moment
        connection.sendall(frame({**job_environment(), PARENT_NAME: str(os.getppid())}))
        connection.recv(1)
    # This process never called MPI_Init, so it need not finalize MPI.
    os._exit(0)


if __name__ == "__main__":
    main()
