"""Software and load of this machine: versions, memory and its biggest users, MPI, volumes.

It is collected by the agent on the node itself, in the environment in which a rank would run.
"""

from __future__ import annotations

import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil

from k2cli import __version__
from k2cli.agent.openmpi import find_libmpi, find_mpirun, version_of
from k2cli.agent.run_processes import run_of
from k2cli.choices import Certainty, Device
from k2cli.errors import ClusterError, K2Error
from k2cli.planning.hardware.gpus import Gpu
from k2cli.rdma_launches import launches_since_boot
from k2cli.settings import expand_home, models_directory, runs_directory
from k2cli.system.disk import disk_use
from k2cli.system.memory_use import memory_of
from k2cli.system.processes import command_of, name_of

_BIGGEST = 5


class ProcessUse(msgspec.Struct, frozen=True):
    """A process that holds memory; ``run_id`` if it is a guard or rank of a run of k2."""

    pid: int
    name: str
    resident_bytes: int
    run_id: str | None = None


class Volume(msgspec.Struct, frozen=True):
    """The volume that a folder is on. ``filesystem`` is the system's name for its type."""

    path: str
    mount_point: str
    filesystem: str
    free_bytes: int
    total_bytes: int


class Software(msgspec.Struct, frozen=True):
    """Environment of k2 on a node: the answer of the agent's verb ``software``.

    ``time`` is the node's clock in seconds since 1970. ``limit_bytes`` is the memory that MLX may
    use, from ``planning.hardware.machine.this_machine``. ``transports`` are those that the node's
    mlx was built with, without MPI, whose library is found at run time (``libmpi``). ``volume``
    holds the models, ``state_volume`` runs and their logs. ``mpi_versions`` has the version of
    every mpirun that was found; ``load_average`` is that of the last minute. ``gpus`` are those
    that MLX may use. ``rdma_launches`` counts those over JACCL since the machine was started.
    ``program`` is the file that runs as ``python``, which is a link in an environment.
    """

    k2_version: str
    python: str
    python_version: str
    mlx_version: str | None
    mlx_lm_version: str | None
    mlx_error: str | None
    memory_bytes: int
    limit_bytes: int | None
    limit_mark: Certainty
    limit_source: str
    device: Device | None = msgspec.field(name="backend")
    transports: tuple[str, ...] = msgspec.field(name="backends")
    available_bytes: int
    mpirun: str | None
    mpi_version: str | None
    libmpi: str | None
    volume: Volume | None
    time: float
    processes: tuple[ProcessUse, ...]
    interfaces: dict[str, tuple[str, ...]] = {}
    mpi_error: str | None = None
    state_volume: Volume | None = None
    mpi_versions: dict[str, str] = {}
    load_average: float | None = None
    cores: int | None = None
    gpus: tuple[Gpu, ...] = ()
    rdma_launches: int = 0
    program: str = ""

    def mpi_version_with(self, launching: Software | None) -> str | None:
        """Version of the Open MPI that a run uses here: at the launching machine's path if any."""
        path = launching.mpirun if launching is not None else None
        return self.mpi_versions.get(path or "", self.mpi_version)


def software(model_folder: str | None = None) -> Software:
    """Collect everything about this environment. Imports mlx.

    Args:
        model_folder: the folder whose volume is examined; k2's folder of models by default.
    """
    memory = psutil.virtual_memory()
    limit, mlx_error = _limit()
    mpirun = find_mpirun()
    mpi_version, mpi_error = _mpi_version(mpirun)
    libmpi = find_libmpi()
    return Software(
        k2_version=__version__,
        python=sys.executable,
        python_version=platform.python_version(),
        mlx_version=_version("mlx"),
        mlx_lm_version=_version("mlx-lm"),
        mlx_error=mlx_error,
        memory_bytes=limit.memory_bytes if limit else int(memory.total),
        limit_bytes=limit.limit_bytes if limit else None,
        limit_mark=limit.limit_mark if limit else "assumed",
        limit_source=limit.limit_source if limit else "",
        device=limit.device if limit else None,
        transports=_transports() if limit else (),
        available_bytes=int(memory.available),
        mpirun=str(mpirun) if mpirun else None,
        mpi_version=mpi_version,
        libmpi=str(libmpi) if libmpi else None,
        volume=volume_of(Path(model_folder) if model_folder else models_directory()),
        time=time.time(),
        processes=_processes(),
        interfaces=_interfaces(),
        mpi_error=mpi_error,
        state_volume=volume_of(runs_directory()),
        mpi_versions=_mpi_versions(mpirun, mpi_version),
        load_average=psutil.getloadavg()[0],
        cores=psutil.cpu_count(),
        gpus=limit.gpus if limit else (),
        rdma_launches=launches_since_boot(),
        program=_program(),
    )


def _program() -> str:
    try:
        return psutil.Process().exe()
    except (psutil.Error, OSError):
        return ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _limit() -> tuple[Any, str | None]:
    """Return this machine as the planner sees it, or the reason that mlx does not load."""
    from k2cli.agent.gpus import machine_with_runs

    try:
        return machine_with_runs(), None
    except K2Error as error:
        return None, error.message
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}"


def _transports() -> tuple[str, ...]:
    import mlx.core as mx

    names = ("ring", "jaccl", "nccl")
    return tuple(name for name in names if mx.distributed.is_available(name))


def _mpi_version(mpirun: Path | None) -> tuple[str | None, str | None]:
    """Return the version of Open MPI, or the reason that it is unknown."""
    if mpirun is None:
        return None, None
    try:
        return version_of(mpirun), None
    except ClusterError as error:
        return None, error.message.removeprefix(f"{mpirun} ")


def _mpi_versions(first: Path | None, version: str | None) -> dict[str, str]:
    """Map the mpirun that is found first, and the one beside this Python, to their versions."""
    found = {str(first): version} if first is not None and version is not None else {}
    beside = Path(sys.executable).parent / "mpirun"
    if str(beside) not in found and beside.is_file():
        other = _mpi_version(beside)[0]
        found |= {str(beside): other} if other is not None else {}
    return found


NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "smbfs", "cifs", "smb3", "afpfs", "webdav", "9p", "ceph", "fuse.sshfs", "sshfs"}
)


def volume_of(folder: Path) -> Volume | None:
    """Find the volume that a folder is on, or will be on once it is made."""
    existing = expand_home(str(folder)).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    existing = existing.resolve()
    try:
        usage = disk_use(existing)
        mounts = psutil.disk_partitions(all=True)
    except OSError:
        return None
    under = [mount for mount in mounts if _is_under(existing, Path(mount.mountpoint))]
    # The last of several mounts on one point hides the others.
    best = max(enumerate(under), key=lambda item: (len(item[1].mountpoint), item[0]), default=None)
    point, kind = (best[1].mountpoint, best[1].fstype) if best else ("/", "")
    return Volume(str(folder), point, kind, usage.free, usage.total)


def _is_under(path: Path, mount: Path) -> bool:
    return path == mount or mount in path.parents


def _processes() -> tuple[ProcessUse, ...]:
    """List the processes of runs, then the biggest other processes."""
    found = []
    for process in psutil.process_iter():
        try:
            # A zombie has no memory and no command line, so it is sorted to the end.
            resident = memory_of(process)
            found.append((resident, process, name_of(process)))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    uses: list[ProcessUse] = []
    for resident, process, name in sorted(found, key=lambda item: -item[0]):
        run_id = run_of(command_of(process))
        if run_id is not None or sum(use.run_id is None for use in uses) < _BIGGEST:
            uses.append(ProcessUse(process.pid, name, resident, run_id))
    return tuple(sorted(uses, key=lambda use: (use.run_id is None, -use.resident_bytes)))


def _interfaces() -> dict[str, tuple[str, ...]]:
    """Map interfaces that are up to their IP addresses; for systems without ``ip``."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(
            address.address.split("%")[0] for address in addresses if address.family in families
        )
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }
