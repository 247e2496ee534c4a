"""Start the process of a rank: command line, environment and inherited descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from k2cli.child_process import ending_with
from k2cli.errors import K2Error
from k2cli.files import nameless_file, private_folder
from k2cli.gpu_name import GpuName
from k2cli.guard.oom_evidence import OomEvidence
from k2cli.protocol import Assignment, Bootstrap
from k2cli.protocol.progress_page import ProgressPage
from k2cli.rdma_launches import PREFERRED_SETTINGS
from k2cli.settings import RUN_OPTION, cache_directory, runs_directory
from k2cli.system.disk import disk_use

DEFAULT_WORKER = "k2cli.rank.main"
# With this, NCCL's first rank would listen on an address that k2 has not chosen, and take any peer.
_NOT_FOR_RANKS = ("NCCL_COMM_ID", *PREFERRED_SETTINGS)
# What a compiler needs for a few kernels and its temporary files.
_KERNELS_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class SpawnedRank:
    """A started rank. ``connection`` is the guard's end of the socket pair."""

    process: asyncio.subprocess.Process
    connection: socket.socket
    page: ProgressPage
    oom_evidence: OomEvidence


async def spawn_rank(
    bootstrap: Bootstrap, worker: str, job: Mapping[str, str] | None = None
) -> SpawnedRank:
    """Start the process of a rank.

    Args:
        worker: the module to run as the rank.
        job: the environment variables that make it part of an MPI job.

    Raises:
        OSError: if the process cannot be started.
    """
    ours, theirs = socket.socketpair()
    page = ProgressPage.create()
    inherited = [theirs.fileno(), page.fileno()]
    settings, files = group_settings(bootstrap.assignment)
    environment = {**os.environ, **(job or {}), **bootstrap.environment}
    environment |= {**gpu_settings(bootstrap.gpu), **settings}
    for name in _NOT_FOR_RANKS:
        environment.pop(name, None)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TMPDIR"] = str(kernel_folder(bootstrap.assignment.run_id))
    for name, content in files.items():
        inherited.append(nameless_file(content))
        environment[name] = f"/dev/fd/{inherited[-1]}"
    oom_evidence = OomEvidence()
    try:
        process = await asyncio.create_subprocess_exec(
            *rank_arguments(bootstrap.assignment, worker, theirs.fileno(), page.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=inherited,
            env=environment,
            preexec_fn=ending_with(os.getpid()) if sys.platform == "linux" else None,
        )
    finally:
        theirs.close()
        for descriptor in inherited[2:]:
            os.close(descriptor)
    return SpawnedRank(process, ours, page, oom_evidence)


def rank_arguments(
    assignment: Assignment, worker: str, guard_fd: int, progress_fd: int
) -> list[str]:
    """Return the command line of a rank, which names its run."""
    return [
        *(sys.executable, "-P", "-m", worker),
        *(RUN_OPTION, assignment.run_id, "--rank", str(assignment.rank)),
        *("--guard-fd", str(guard_fd), "--progress-fd", str(progress_fd)),
    ]


def kernel_folder(run_id: str) -> Path:
    """Return the folder in which MLX keeps the libraries that it compiles, and loads them again.

    MLX uses ``$TMPDIR/mlx/VERSION/DEVICE``. In a shared TMPDIR, another user could make that first
    and put a library there. The folder lasts, since compiling takes long; a cache that cannot be
    made, has no room left, or that other users can access, is replaced by a folder of the run.
    Within it each rank has a folder of its own (``rank.kernels.cache``).

    Raises:
        OSError: if neither folder can be used.
    """
    # A home folder may be shared by machines of several kinds.
    name = f"mlx-{sys.platform}-{platform.machine()}"
    cache: Path | None = None
    with contextlib.suppress(OSError, K2Error):  # K2Error: this user has no home folder
        cache = private_folder(cache_directory() / name)
        if _has_room(cache):
            return cache
    with contextlib.suppress(OSError):
        own = private_folder(runs_directory() / run_id / name)
        if cache is None or _has_room(own):
            return own
    # Its kernels may be all that this run needs.
    return cache or private_folder(runs_directory() / run_id / name)


def _has_room(folder: Path) -> bool:
    return disk_use(folder).free >= _KERNELS_BYTES


def gpu_settings(gpu: GpuName | None) -> dict[str, str]:
    """Return the variables that leave a rank one GPU; none if the plan did not choose it.

    By its UUID, since CUDA may count GPUs in another order than ``nvidia-smi``. The GPU is one of
    those that ``CUDA_VISIBLE_DEVICES`` of the user allows, because plans know no others.
    """
    if gpu is None or not gpu.uuid:
        return {}
    return {"CUDA_VISIBLE_DEVICES": gpu.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def group_settings(assignment: Assignment) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the variables with which a rank joins its MLX group: values, and contents of files.

    The names are those of ``mlx/_distributed_utils/launch.py`` (``launch_ring``,
    ``launch_jaccl``, ``launch_nccl``); MPI needs none of them.
    """
    rank = {"MLX_RANK": str(assignment.rank)}
    if assignment.transport == "ring" and assignment.ring_hosts is not None:
        return rank, {"MLX_HOSTFILE": msgspec.json.encode(assignment.ring_hosts)}
    if assignment.transport == "jaccl" and assignment.jaccl_coordinator is not None:
        coordinator = {"MLX_JACCL_COORDINATOR": assignment.jaccl_coordinator}
        devices = msgspec.json.encode(assignment.jaccl_devices)
        return rank | coordinator, {"MLX_IBV_DEVICES": devices}
    if assignment.transport == "nccl" and assignment.nccl_coordinator is not None:
        return rank | _nccl_settings(assignment, assignment.nccl_coordinator), {}
    return {}, {}


def _nccl_settings(assignment: Assignment, coordinator: str) -> dict[str, str]:
    """Return NCCL's variables; others that the user has set, as NCCL_NVLS_ENABLE, stay as set."""
    host, _, port = coordinator.rpartition(":")
    settings = {"MLX_WORLD_SIZE": str(assignment.size), "NCCL_HOST_IP": host, "NCCL_PORT": port}
    # Its status service would listen on a port of its own.
    settings["NCCL_RAS_ENABLE"] = "0"
    # The interface may have addresses of the other family, which the cluster does not name.
    settings["NCCL_SOCKET_FAMILY"] = "AF_INET"
    if assignment.nccl_interface is not None:
        # "=" takes the name as it is; without it, it is a prefix.
        settings["NCCL_SOCKET_IFNAME"] = f"={assignment.nccl_interface}"
    return settings
