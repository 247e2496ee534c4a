"""Starts the process of a rank: for a bootstrap, or on standby, before there is one.

A rank on standby has imported what it needs, and waits for its ``Start``. It holds nothing of a
model and no port; it ends as any rank does when its guard is gone.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from k2cli.runtime.kernel_record import KernelRecord
from k2cli.runtime.progress import ProgressPage
from k2cli.runtime.protocol import Assignment, Bootstrap

DEFAULT_WORKER = "k2cli.runtime.worker"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class SpawnedRank:
    """A rank's process, which has not been told yet what it is.

    ``connection`` is this end of its socket pair, ``settings`` a descriptor of the nameless file
    that it has inherited for MLX's description of its group.
    """

    process: asyncio.subprocess.Process
    connection: socket.socket
    page: ProgressPage
    kernel: KernelRecord
    settings: int

    def environment_of(self, bootstrap: Bootstrap) -> dict[str, str]:
        """What a rank that was on standby has to add to its environment."""
        try:
            return environment_of(bootstrap, self.settings)
        finally:
            os.close(self.settings)


async def spawn_rank(
    run_id: str,
    rank: int,
    worker: str,
    bootstrap: Bootstrap | None = None,
    job: Mapping[str, str] | None = None,
) -> SpawnedRank:
    """Start the process of a rank.

    Args:
        worker: the module that is the rank.
        bootstrap: of its run; without one it is on standby.
        job: the environment that makes it part of an MPI job.

    Raises:
        OSError: if the process cannot be started.
    """
    ours, theirs = socket.socketpair()
    page = ProgressPage.create()
    settings = _nameless_file()
    environment = {**os.environ, **(job or {})}
    if bootstrap is not None:
        environment |= environment_of(bootstrap, settings)
    environment["PYTHONUNBUFFERED"] = "1"
    kernel = KernelRecord()
    try:
        process = await asyncio.create_subprocess_exec(
            *rank_arguments(run_id, rank, worker, theirs.fileno(), page.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=[theirs.fileno(), page.fileno(), settings],
            env=environment,
            preexec_fn=_die_with_guard(),
        )
    except OSError:
        os.close(settings)
        raise
    finally:
        theirs.close()
    return SpawnedRank(process, ours, page, kernel, settings)


def _die_with_guard() -> Callable[[], None] | None:
    """What the child calls between fork and exec, so that it cannot outlive its guard (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    guard = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(1)

    return prepare


def rank_arguments(
    run_id: str, rank: int, worker: str, guard_fd: int, progress_fd: int
) -> list[str]:
    """The command line of a rank. It always contains ``k2cli.runtime`` and the run's id."""
    # A test's rank is another module; the mark of the run must be on its command line all the same.
    mark = [] if worker.startswith("k2cli.runtime") else ["-X", "k2cli.runtime"]
    return [
        *(sys.executable, "-P", *mark, "-m", worker),
        *("--run", run_id, "--rank", str(rank)),
        *("--guard-fd", str(guard_fd), "--progress-fd", str(progress_fd)),
    ]


def group_settings(assignment: Assignment) -> tuple[dict[str, str], dict[str, bytes]]:
    """What MLX wants in a rank's environment to join its group: values, and content of a file.

    The names are those of ``mlx/_distributed_utils/launch.py`` (``launch_ring``,
    ``launch_jaccl``); MPI needs none of them.
    """
    rank = {"MLX_RANK": str(assignment.rank)}
    if assignment.transport == "ring" and assignment.ring_hosts is not None:
        return rank, {"MLX_HOSTFILE": msgspec.json.encode(assignment.ring_hosts)}
    if assignment.transport == "jaccl" and assignment.jaccl_coordinator is not None:
        coordinator = {"MLX_JACCL_COORDINATOR": assignment.jaccl_coordinator}
        devices = msgspec.json.encode(assignment.jaccl_devices)
        return rank | coordinator, {"MLX_IBV_DEVICES": devices}
    return {}, {}


def environment_of(bootstrap: Bootstrap, settings: int) -> dict[str, str]:
    """What a bootstrap adds to the environment of its rank.

    Args:
        settings: a descriptor of the nameless file, which is filled.
    """
    values, files = group_settings(bootstrap.assignment)
    for name, content in files.items():
        # The rank shares the position in the file on some systems: it stays at the start.
        os.pwrite(settings, content, 0)
        values[name] = f"/dev/fd/{settings}"
    return {**bootstrap.environment, **values}


def _nameless_file() -> int:
    """A descriptor of an empty file without a name, which nobody need remove."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
