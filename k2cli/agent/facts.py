"""Versions and paths of this machine, which a launch needs before it starts anything here."""

from __future__ import annotations

import sys

import msgspec

from k2cli import __version__
from k2cli.agent.openmpi import find_libmpi, find_mpirun, mpi_major
from k2cli.settings import runs_directory

# The exit status of an agent that is asked for a verb that its version of k2 does not have.
UNKNOWN_VERB_STATUS = 64


class NodeFacts(msgspec.Struct, frozen=True):
    """What a node says of itself before a launch."""

    k2_version: str
    python: str
    runs_directory: str
    libmpi: str | None
    mpirun: str | None = None
    mpi_major: int | None = None


def facts() -> NodeFacts:
    """Versions and paths of this node."""
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
