"""Search for Open MPI, and the command line of its mpirun: versions 4 and 5.

MLX loads the MPI library itself, by name. Unless ``MLX_MPI_LIBNAME`` names the real library, MLX
silently makes groups of size 1 (the PyPI wheel's ``libmpi.so`` is a linker script).
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
from k2cli.pip_command import open_mpi_or_ring

_LIBRARY_NAMES = ("libmpi.so.40", "libmpi.40.dylib", "libmpi.dylib")
_VERSION_SECONDS = 20
_VERSION = re.compile(r"Open ?MPI\)? v?(\d{1,9}(?:\.\d{1,9})+)")


@dataclass(frozen=True, slots=True)
class OpenMpi:
    """An ``mpirun`` of Open MPI. ``major`` is 4 or 5."""

    mpirun: Path
    major: int


def find_mpirun() -> Path | None:
    """Find ``mpirun`` on the PATH, beside this Python (the PyPI wheel) or in Homebrew's folder."""
    if found := shutil.which("mpirun"):
        return Path(found)
    # The PATH of a command over ssh lacks Homebrew's folders.
    places = [Path(sys.executable).parent, Path("/opt/homebrew/bin"), Path("/usr/local/bin")]
    found_there = (place / "mpirun" for place in places)
    return next((path for path in found_there if os.access(path, os.X_OK)), None)


def find_openmpi() -> OpenMpi:
    """Find the Open MPI to launch with.

    Raises:
        ClusterError: if there is no mpirun, it is not Open MPI's, or its library is missing.
    """
    mpirun = find_mpirun()
    if mpirun is None:
        raise ClusterError(
            "no mpirun on the PATH or beside this Python",
            open_mpi_or_ring(),
        )
    version = version_of(mpirun)
    if find_libmpi() is None:
        raise ClusterError(
            f"{mpirun} is there, but not the library that MLX needs ({_LIBRARY_NAMES[0]})",
            open_mpi_or_ring(),
        )
    return OpenMpi(mpirun, _major(version))


@functools.cache
def mpi_major(mpirun: Path) -> int | None:
    """Return the major version, 4 or 5; None if it is not Open MPI's, or does not run."""
    try:
        return _major(version_of(mpirun))
    except ClusterError:
        return None


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def version_of(mpirun: Path) -> str:
    """Return the version of an Open MPI, such as ``5.0.11``.

    Raises:
        ClusterError: if it does not run, or is not Open MPI's.
    """
    try:
        done = subprocess.run(
            [str(mpirun), "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{mpirun} does not run: {error}", "--backend ring") from error
    said = (done.stdout or done.stderr).strip()
    match = _VERSION.search(said)
    if match is None:
        first_line = said.splitlines()[0] if said else "nothing"
        raise ClusterError(
            f"{mpirun} is not Open MPI's: its version is '{first_line}'",
            open_mpi_or_ring(),
        )
    return match.group(1)


def find_libmpi() -> Path | None:
    """Find the real MPI library that belongs to ``find_mpirun``'s mpirun."""
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
    """Look the library up in the cache of Linux's dynamic linker."""
    program = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        done = subprocess.run([program, "-p"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rf"{re.escape(_LIBRARY_NAMES[0])} .*=> (\S+)", done.stdout)
    return Path(match.group(1)) if match else None


def mpirun_arguments(
    mpi: OpenMpi,
    scratch: Path,
    *,
    remote: bool,
    networks: Sequence[str] = (),
    is_root: bool,
) -> list[str]:
    """Build the command line of mpirun up to the programs that it starts.

    Args:
        mpi: the Open MPI to use.
        scratch: a folder with a short path, for its sockets and, locally, its shared memory.
        remote: True if a rank is on another machine.
        networks: in CIDR notation, because a network has another interface on each machine.
        is_root: True adds the flag without which Open MPI refuses to run as root.
    """
    five = mpi.major >= 5
    own = "--prtemca" if five else "--mca"
    settings = [("prte_tmpdir_base" if five else "orte_tmpdir_base", str(scratch))]
    if not five:
        settings.append(("plm_rsh_no_tree_spawn", "1"))
    arguments = [str(mpi.mpirun), "--bind-to", "none"]
    if is_root:
        arguments.append("--allow-run-as-root")
    arguments += ["--map-by", ":OVERSUBSCRIBE"] if five else ["--oversubscribe"]
    arguments += [part for name, value in settings for part in (own, name, value)]
    transport = _transport(mpi, networks) if remote else _local_transport(mpi, scratch)
    return arguments + [
        part for name, value in transport.items() for part in ("--mca", name, value)
    ]


def _transport(mpi: OpenMpi, networks: Sequence[str]) -> dict[str, str]:
    """Select TCP over the chosen networks, also between ranks of one machine."""
    parameters = {"pml": "ob1", "btl": "self,tcp", "mpi_yield_when_idle": "1"}
    if networks:
        parameters["btl_tcp_if_include"] = ",".join(networks)
    return parameters


def _local_transport(mpi: OpenMpi, scratch: Path) -> dict[str, str]:
    """Select shared memory and the loopback interface, without probing other networks."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    shared = "sm" if mpi.major >= 5 else "vader"
    parameters = {
        "pml": "ob1",
        "btl": f"self,{shared},tcp",
        "btl_tcp_if_include": loopback,
        f"btl_{shared}_backing_directory": str(scratch),
        # Otherwise a waiting rank spins on a core that the computing rank could use.
        "mpi_yield_when_idle": "1",
    }
    if mpi.major < 5:
        parameters["oob_tcp_if_include"] = loopback
    return parameters
