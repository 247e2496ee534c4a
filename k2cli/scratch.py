"""Private folders of a run, for MPI's sockets and files: in memory or in the temporary folder.

Other users of the machine can write there too. So each folder has a name that nobody can guess, is
made by the process that needs it, for one attempt, and is used only if it is this user's own and
closed to everybody else. The run's id in the name lets others of this user's processes find it:
MPI slots, and commands that remove what a run has left.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from k2cli.errors import ClusterError

# Sockets need short paths; the first folder is in memory.
_BASES = ("/dev/shm", "/tmp")
_TOKEN_BYTES = 5
_TOKEN = re.compile(r"\.[0-9a-f]{10}")
_ATTEMPTS = 100


def make_scratch(run_id: str) -> Path:
    """Make a folder of a run that only this user can access.

    Raises:
        ClusterError: if no folder can be made; the hint repairs the temporary folder.
    """
    base = _usable_base()
    for _ in range(_ATTEMPTS):
        path = base / f"k2-{run_id}.{secrets.token_hex(_TOKEN_BYTES)}"
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise ClusterError(f"a private folder cannot be made in {base}: {error}") from error
        check_private(path)
        return path
    raise ClusterError(f"no private folder could be made in {base}: all names exist")


def check_private(path: Path) -> None:
    """Check that a folder is a real one of this user, closed to everybody else.

    Raises:
        ClusterError: if it is not.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise ClusterError(f"the private folder {path} cannot be used: {error}") from error
    if not _is_own_folder(found) or found.st_mode & 0o077:
        raise ClusterError(f"{path} must be a folder that only this user can access")


def find_scratch(run_id: str) -> list[Path]:
    """Return the folders of a run that are this user's own and private."""
    found = []
    for path in _named_for(run_id):
        with suppress(ClusterError):
            check_private(path)
            found.append(path)
    return found


def remove_scratch(run_id: str) -> bool:
    """Remove the folders of a run that are this user's; return True if there were any.

    Runs of earlier versions had one folder, without a random part in its name.
    """
    old = [Path(base) / f"k2-{run_id}" for base in _BASES]
    found = [path for path in (*_named_for(run_id), *old) if _is_own(path)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return bool(found)


def _named_for(run_id: str) -> list[Path]:
    beginning = f"k2-{run_id}"
    found = []
    for base in _BASES:
        with suppress(OSError), os.scandir(base) as entries:
            found += [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(beginning)
                and _TOKEN.fullmatch(entry.name[len(beginning) :])
            ]
    return found


def _is_own(path: Path) -> bool:
    with suppress(OSError):
        return _is_own_folder(path.lstat())
    return False


def _is_own_folder(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _usable_base() -> Path:
    """Return the first folder that this user can write and where no user can replace another's.

    Raises:
        ClusterError: if there is none.
    """
    for base in _BASES:
        with suppress(OSError):
            found = os.stat(base)  # /tmp is a link on macOS
            safe = found.st_mode & stat.S_ISVTX or not found.st_mode & 0o022
            if stat.S_ISDIR(found.st_mode) and safe and os.access(base, os.W_OK):
                return Path(base)
    raise ClusterError(
        f"neither of {', '.join(_BASES)} can be used: without the sticky bit, users can replace "
        "the folders of others",
        f"sudo chmod 1777 {_BASES[-1]}",
    )
