"""Files of a run on this machine, in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from k2cli.files import write_atomically
from k2cli.scratch import remove_scratch
from k2cli.settings import runs_directory


def run_folder(run_id: str) -> Path:
    """Return the folder of a run's files on this node."""
    return runs_directory() / run_id


def write_private(run_id: str, name: str, data: bytes) -> None:
    """Write a file of a run atomically, readable by its owner only."""
    folder = run_folder(run_id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(folder / name, data, 0o600)


def remove_bootstraps(run_id: str) -> None:
    """Remove bootstrap files that no guard has read, scratch folders, and then an empty folder.

    On the machine that launched the run, the folder also holds its record and stays.
    """
    folder = run_folder(run_id)
    remove_scratch(run_id)
    for path in folder.glob("bootstrap-*.json"):
        path.unlink(missing_ok=True)
    for path in folder.glob("mlx-*"):  # kernels that could not be put into the cache
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
