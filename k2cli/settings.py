"""Where k2 keeps things, the mark of its processes, and the environment variables that it reads.

Directories follow the XDG base directory rules, on macOS too. ``K2_CONFIG_DIR``, ``K2_STATE_DIR``
and ``K2_DATA_DIR`` override them one by one; tests set all three.
"""

from __future__ import annotations

import os
from pathlib import Path

# The mark of the processes of a run on their command lines; the run's id follows it.
RUN_OPTION = "--k2-run"


def _directory(override: str, xdg: str, fallback: str) -> Path:
    if value := os.environ.get(override):
        return Path(value)
    if value := os.environ.get(xdg):
        return Path(value) / "k2"
    return Path.home() / fallback / "k2"


def config_directory() -> Path:
    """Clusters and the user's settings: ``~/.config/k2``."""
    return _directory("K2_CONFIG_DIR", "XDG_CONFIG_HOME", ".config")


def state_directory() -> Path:
    """Runs, their logs and crash reports: ``~/.local/state/k2``."""
    return _directory("K2_STATE_DIR", "XDG_STATE_HOME", ".local/state")


def data_directory() -> Path:
    """Models that k2 itself made or converted: ``~/.local/share/k2``."""
    return _directory("K2_DATA_DIR", "XDG_DATA_HOME", ".local/share")


def runs_directory() -> Path:
    """One folder per run, named by its id."""
    return state_directory() / "runs"


def locks_directory() -> Path:
    """Which runs have this machine, whoever started them: one place for all its users.

    ``K2_STATE_DIR`` moves it too. ``/var/tmp`` is not cleared while a run lasts, unlike ``/tmp``.
    """
    if value := os.environ.get("K2_STATE_DIR"):
        return Path(value) / "locks"
    return Path("/var/tmp/k2-locks")


def scratch_directories(run_id: str) -> tuple[Path, ...]:
    """Short paths for a run's sockets and MPI's files: in memory first, where there is that."""
    return tuple(Path(base) / f"k2-{run_id}" for base in ("/dev/shm", "/tmp"))


def scratch_directory(run_id: str) -> Path:
    """The one of them that this machine uses."""
    first, second = scratch_directories(run_id)
    return first if os.access(first.parent, os.W_OK) else second


def models_directory() -> Path:
    """One folder per model that k2 converted or downloaded by alias."""
    return data_directory() / "models"


def debug_enabled() -> bool:
    """``K2_DEBUG=1`` shows tracebacks of internal errors."""
    return os.environ.get("K2_DEBUG", "") not in ("", "0")
