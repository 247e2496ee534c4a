"""Directories of k2, the mark of its processes, and its environment variables.

Directories follow the XDG base directory rules, on macOS too. ``K2_CONFIG_DIR``, ``K2_STATE_DIR``,
``K2_DATA_DIR`` and ``K2_CACHE_DIR`` override one directory each; tests set the first three.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from k2cli.errors import K2Error

# The mark of the processes of a run on their command lines; the run's id follows it.
RUN_OPTION = "--k2-run"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def user_name() -> str:
    """Return the name of the user; "" if neither the environment nor the system knows one."""
    import getpass  # slow to import

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def expand_home(text: str) -> Path:
    """Return the path with the home folder in place of ``~``; unchanged if there is none."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


_DIRECTORIES = (
    ("K2_CONFIG_DIR", "XDG_CONFIG_HOME", ".config"),
    ("K2_STATE_DIR", "XDG_STATE_HOME", ".local/state"),
    ("K2_DATA_DIR", "XDG_DATA_HOME", ".local/share"),
    ("K2_CACHE_DIR", "XDG_CACHE_HOME", ".cache"),
)
"""k2's variable, that of the XDG rules, and the folder in the home folder."""


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
    return _directory(*_DIRECTORIES[0])


def state_directory() -> Path:
    """Return the folder of runs, logs and crash reports, by default ``~/.local/state/k2``."""
    return _directory(*_DIRECTORIES[1])


def data_directory() -> Path:
    """Return the folder of models that k2 converted, by default ``~/.local/share/k2``."""
    return _directory(*_DIRECTORIES[2])


def folder_variable(path: Path) -> str:
    """Return the variable that moves the folder of k2 that a path is in; "" if it is in none."""
    for names in _DIRECTORIES:
        try:
            if path.absolute().is_relative_to(_directory(*names).absolute()):
                return names[0]
        except K2Error:
            continue  # there is no home folder
    return ""


def is_run_id(text: str) -> bool:
    """True if the text can be the id of a run: one component of a path, and no option."""
    return _RUN_ID.fullmatch(text) is not None


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


def cache_directory() -> Path:
    """Return the folder of files that can be made again, by default ``~/.cache/k2``."""
    return _directory(*_DIRECTORIES[3])


def models_directory() -> Path:
    """Return the parent of the folders of models that k2 converted or downloaded by alias."""
    return data_directory() / "models"


def debug_enabled() -> bool:
    """True if tracebacks of internal errors are to be shown (``K2_DEBUG=1``)."""
    return os.environ.get("K2_DEBUG", "") not in ("", "0")
