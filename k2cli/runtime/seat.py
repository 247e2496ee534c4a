"""A seat in an MPI job: what mpirun starts in a rank's place, ``python -m k2cli.runtime.seat``.

A rank is the child of its guard, and guards are started the same way whatever the back end, so
that they outlive mpirun and restarts. What makes a process part of an MPI job is its environment:
the seat hands its own to the guard on the same node, which starts the rank with it, and then waits
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

from k2cli.runtime.guard_seat import PARENT_NAME, seat_path
from k2cli.runtime.wire import frame

_RETRY_SECONDS = 0.05
# The guard is started at the same time; its own deadline is the one that reports.
_LIMIT_SECONDS = 120.0
_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "ORTE_", "OPAL_", "UCX_")
_NAMES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def job_environment() -> dict[str, str]:
    """What of this process's environment makes it part of the MPI job."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) or (name in _NAMES and value)
    }


def _connect(path: str) -> socket.socket:
    until = time.monotonic() + _LIMIT_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > until:
                sys.stderr.write(f"no guard waits at {path}: {error}\n")
                sys.exit(1)
            time.sleep(_RETRY_SECONDS)


def main() -> None:
    """Hand over the environment, and stay until the guard closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="k2cli.runtime.seat")
    parser.add_argument("--run", required=True, help="id of the run")
    parser.add_argument("--rank", required=True, type=int, help="the rank planned for this seat")
    options = parser.parse_args()
    number = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMIX_RANK", ""))
    if number != str(options.rank):
        sys.stderr.write(f"mpirun calls this process rank {number}, planned was {options.rank}\n")
        sys.exit(1)
    connection = _connect(seat_path(options.run, options.rank))
    connection.sendall(frame({**job_environment(), PARENT_NAME: str(os.getppid())}))
    with contextlib.suppress(OSError):
        connection.recv(1)
    # What is not an MPI program leaves without MPI's farewell.
    os._exit(0)


if __name__ == "__main__":
    main()
