"""Files of a run on this machine, in its folder."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from k2cli.files import FULL_DISK, matching, write_atomically
from k2cli.scratch import remove_scratch
from k2cli.settings import runs_directory

RESERVE_NAME = "reserve"
_RESERVE_BYTES = 64 * 1024


def run_folder(run_id: str) -> Path:
    """Return the folder of a run's files on this node."""
    return runs_directory() / run_id


def write_private(run_id: str, name: str, data: bytes) -> None:
    """Write a file of a run atomically, readable by its owner only.

    Raises:
        OSError: if the file cannot be written, even with the run's reserve.
    """
    folder = run_folder(run_id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_with_reserve(folder / name, data, 0o600)


def make_reserve(run_id: str) -> None:
    """Set room aside for the record and the bootstraps of a run, in case the disk becomes full.

    Raises:
        OSError: if there is no room for it now.
    """
    path = run_folder(run_id) / RESERVE_NAME
    if not path.exists():
        # Random bytes: file systems that compress would set no room aside for zeros.
        write_private(run_id, RESERVE_NAME, os.urandom(_RESERVE_BYTES))


def write_with_reserve(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write a file of a run atomically; on a full disk, give up the run's reserve for it.

    Raises:
        OSError: if that does not suffice.
    """
    try:
        write_atomically(path, data, mode)
    except OSError as error:
        reserve = path.with_name(RESERVE_NAME)
        if error.errno not in FULL_DISK or path == reserve or not reserve.exists():
            raise
        with suppress(OSError):
            reserve.unlink()
        write_atomically(path, data, mode)


def remove_bootstraps(run_id: str) -> None:
    """Remove bootstrap files that no guard has read, scratch folders, and then an empty folder.

    On the machine that launched the run, the folder also holds its record and stays.
    """
    folder = run_folder(run_id)
    remove_scratch(run_id)
    for path in matching(folder, "bootstrap-*.json"):
        path.unlink(missing_ok=True)
    for path in matching(folder, "mlx-*"):  # kernels that could not be put into the cache
        shutil.rmtree(path, ignore_errors=True)
    try:
        folder.rmdir()
    except OSError as error:
        # Another command may have removed it, or written into it, at this very moment.
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
