"""Versions and paths of this machine that a launch needs before it starts a process here."""

from __future__ import annotations

import sys

import msgspec

from k2cli import __version__
from k2cli.agent.openmpi import find_libmpi, find_mpirun, mpi_major
from k2cli.settings import runs_directory

# Exit status of an agent whose version of k2 does not have the verb.
UNKNOWN_VERB_STATUS = 64


class NodeFacts(msgspec.Struct, frozen=True):
    """Versions and paths of a node."""

    k2_version: str
    python: str
    runs_directory: str
    libmpi: str | None
    mpirun: str | None = None
    mpi_major: int | None = None


def facts() -> NodeFacts:
    """Collect the versions and paths of this node."""
    libmpi = find_libmpi()
    mpirun = find_mpirun()
    return NodeFacts(
        __version__,
        sys.executable,
        str(runs_directory()),
        str(libmpi) if libmpi else None,
        str(mpirun) if mpirun else None,
        mpi_major(mpirun) if mpirun else None,
    )
