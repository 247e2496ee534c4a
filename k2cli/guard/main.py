"""The guard process: the parent of one rank, on the rank's node. It never imports mlx.

The launcher starts it, directly or over ssh, as
``python -m k2cli.guard.main --k2-run ID --bootstrap NAME --rank R``; nothing imports it. Its
bootstrap file holds its instructions and is deleted once read. It ends its rank and itself when the
run is over, when it is ordered to, and when the process that it reports to is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from typing import NoReturn

import msgspec

from k2cli import event_loop
from k2cli.errors import K2Error, UsageError
from k2cli.files import decode_json, read_regular
from k2cli.guard.follower import FollowerGuard
from k2cli.guard.leader_session import LeaderSession
from k2cli.guard.spawn import DEFAULT_WORKER
from k2cli.guard.supervisor_pipe import SupervisorPipe
from k2cli.protocol import Bootstrap
from k2cli.settings import RUN_OPTION, runs_directory
from k2cli.stderr import say_on_stderr
from k2cli.system.file_limit import raise_file_limit

_LIMIT_BYTES = 16 * 2**20


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="k2cli.guard.main", description="A guard of k2.")
    parser.add_argument(RUN_OPTION, dest="run", required=True, help="id of the run")
    parser.add_argument(
        "--bootstrap", required=True, help="file name, in the run's folder; {rank} is replaced"
    )
    parser.add_argument("--rank", type=int, required=True, help="the rank to guard")
    parser.add_argument("--worker-module", default=DEFAULT_WORKER, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def read_bootstrap(run_id: str, name: str, rank: int) -> Bootstrap:
    """Read the bootstrap file of a rank, and delete the file, since it holds the run's secret.

    Raises:
        UsageError: if there is no such file, or it is for another rank or run.
    """
    path = runs_directory() / run_id / name.format(rank=rank)
    try:
        content = read_regular(path, _LIMIT_BYTES)
        path.unlink()
        bootstrap = decode_json(content, type=Bootstrap)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path} is not a bootstrap file: {error}") from error
    assignment = bootstrap.assignment
    if (assignment.run_id, assignment.rank) != (run_id, rank):
        raise UsageError(f"{path} is for rank {assignment.rank} of run {assignment.run_id}")
    return bootstrap


async def _live(bootstrap: Bootstrap, worker: str) -> NoReturn:
    """Guard the rank until the run ends, then exit the process.

    ``asyncio.run`` would first wait for threads, such as one that still reads a tokenizer or waits
    for the mutex of the locks.
    """
    guard: LeaderSession | FollowerGuard
    if bootstrap.assignment.rank == 0:
        guard = LeaderSession(bootstrap, worker, await SupervisorPipe.open())
    else:
        guard = FollowerGuard(bootstrap, worker)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, guard.on_sigterm)
    status = await guard.run()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Run a guard and exit with its status."""
    # The launcher handles Ctrl-C and a closed terminal.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise_file_limit()
    options = _parse_arguments(sys.argv[1:])
    try:
        bootstrap = read_bootstrap(options.run, options.bootstrap, options.rank)
    except K2Error as error:
        say_on_stderr(f"guard: {error.message}")
        sys.exit(error.exit_code)
    event_loop.run(_live(bootstrap, options.worker_module))


if __name__ == "__main__":
    main()
