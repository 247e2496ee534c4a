"""The files of a run on this machine: its folder, and the folders of MPI's sockets."""

from __future__ import annotations

import shutil
from pathlib import Path

from k2cli.files import write_atomically
from k2cli.settings import runs_directory, scratch_directories, scratch_directory


def run_folder(run_id: str) -> Path:
    """Where this node keeps what belongs to a run."""
    return runs_directory() / run_id


def write_private(run_id: str, name: str, data: bytes) -> None:
    """Write a file of a run, readable by its owner only, whole or not at all."""
    folder = run_folder(run_id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(folder / name, data, 0o600)


def remove_bootstraps(run_id: str) -> None:
    """Remove bootstrap files that no guard has read, and the run's folder if that leaves it empty.

    Where the run was launched from, its record stays there.
    """
    folder = run_folder(run_id)
    remove_scratch(run_id)
    for path in folder.glob("bootstrap-*.json"):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def scratch_path(run_id: str) -> Path:
    """A short path for MPI's sockets and shared memory: in memory where the system has that."""
    return scratch_directory(run_id)


def make_scratch(run_id: str) -> Path:
    """Make that folder, for this user alone."""
    path = scratch_path(run_id)
    path.mkdir(mode=0o700)
    return path


def remove_scratch(run_id: str) -> None:
    """Remove a run's folders of sockets and shared memory."""
    for path in scratch_directories(run_id):
        shutil.rmtree(path, ignore_errors=True)
