"""Directories of k2, the mark of its processes, and its environment variables.

Directories follow the XDG base directory rules, on macOS too. ``K2_CONFIG_DIR``, ``K2_STATE_DIR``
and ``K2_DATA_DIR`` override one directory each; tests set all three.
"""

from __future__ import annotations

import os
from pathlib import Path

from k2cli.errors import K2Error

# The mark of the processes of a run on their command lines; the run's id follows it.
RUN_OPTION = "--k2-run"


def _directory(override: str, xdg: str, fallback: str) -> Path:
    if value := os.environ.get(override):
        return Path(value)
    if value := os.environ.get(xdg):
        return Path(value) / "k2"
    try:
        return Path.home() / fallback / "k2"
    except RuntimeError:
        raise K2Error(
            f"HOME is not set, and user {os.getuid()} has no home folder",
            f"set HOME to a folder of yours, or {override} for this one alone",
        ) from None


def config_directory() -> Path:
    """Return the folder of clusters and the user's settings, by default ``~/.config/k2``."""
    return _directory("K2_CONFIG_DIR", "XDG_CONFIG_HOME", ".config")


def state_directory() -> Path:
    """Return the folder of runs, logs and crash reports, by default ``~/.local/state/k2``."""
    return _directory("K2_STATE_DIR", "XDG_STATE_HOME", ".local/state")


def data_directory() -> Path:
    """Return the folder of models that k2 converted, by default ``~/.local/share/k2``."""
    return _directory("K2_DATA_DIR", "XDG_DATA_HOME", ".local/share")


def runs_directory() -> Path:
    """Return the parent of the folders of runs, which are named by run id."""
    return state_directory() / "runs"


def locks_directory() -> Path:
    """Return the folder of this machine's locks, shared by all its users.

    ``K2_STATE_DIR`` moves it too. Unlike ``/tmp``, ``/var/tmp`` is not cleared during a run.
    """
    if value := os.environ.get("K2_STATE_DIR"):
        return Path(value) / "locks"
    return Path("/var/tmp/k2-locks")


def scratch_directories(run_id: str) -> tuple[Path, ...]:
    """Return possible short paths for a run's sockets and MPI's files; the first is in memory."""
    return tuple(Path(base) / f"k2-{run_id}" for base in ("/dev/shm", "/tmp"))


def scratch_directory(run_id: str) -> Path:
    """Return the one of ``scratch_directories`` that this machine can use."""
    first, second = scratch_directories(run_id)
    return first if os.access(first.parent, os.W_OK) else second


def models_directory() -> Path:
    """Return the parent of the folders of models that k2 converted or downloaded by alias."""
    return data_directory() / "models"


def debug_enabled() -> bool:
    """True if tracebacks of internal errors are to be shown (``K2_DEBUG=1``)."""
    return os.environ.get("K2_DEBUG", "") not in ("", "0")
