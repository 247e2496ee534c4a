"""A host as it was built: what is recorded then, and the way back to it.

What can change on a host is its mounts, its own folders in memory (``/tmp``, ``/run``, ...), its
home, and the files that the lab wrote for it. Everything else of the disk is the machine's.

Compiled kernels stay, as they do on a machine that has launched before: they are named by what they
were compiled for, have digests, and take a rank seconds of a processor.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lab.errors import LabError
from lab.home import KEPT_FOLDERS, OWN_FOLDERS
from lab.namespaces import enter_command, mount_points
from lab.requirements import find_program
from lab.state import HostState

_MOUNTS, _ORIGINAL = "mounts.json", "original"
_PARTS = ("etc", "ssh", "home")
# Grows with each connection; kept, since it says why sshd does not start.
_LOG = "sshd.log"
_SECONDS = 20.0
# See k2cli.guard.spawn.kernel_folder and k2cli.rank.kernels.cache: what ranks have shared.
_KERNELS = "home/.cache/k2/mlx-*/cpu/mlx-*"


def record_host(host: HostState, folder: Path) -> None:
    """Keep the mount points of a new host, and copies of its files, in the host's ``folder``."""
    (folder / _MOUNTS).write_bytes(msgspec.json.encode(mount_points(host)))
    for part in _PARTS:
        shutil.copytree(folder / part, folder / _ORIGINAL / part)


def restore_host(host: HostState, folder: Path) -> bool:
    """Undo what changed on a host since ``record_host``; no process may be using it.

    Returns:
        True if sshd's key or settings were others, so that it must be started again.

    Raises:
        LabError: if a mount cannot be removed.
    """
    mounts = msgspec.json.decode((folder / _MOUNTS).read_bytes(), type=list[str])
    _unmount(host, mounts)
    root = Path(f"/proc/{host.pid}/root")
    kept = {*mounts, *KEPT_FOLDERS}
    for own in OWN_FOLDERS:
        if (root / own.lstrip("/")).is_dir():
            _empty(root, own, kept)
    original = folder / _ORIGINAL
    _empty(folder, "/home", _kernels(folder))
    shutil.copytree(original / "home", folder / "home", dirs_exist_ok=True)
    _write_back(original / "etc", folder / "etc")
    return _write_back(original / "ssh", folder / "ssh")


def _kernels(folder: Path) -> set[str]:
    """Return the folders of compiled kernels, as paths below ``folder``; none through a link."""
    found = folder.resolve().glob(_KERNELS)
    return {f"/{path.relative_to(folder.resolve())}" for path in found if path.resolve() == path}


def _unmount(host: HostState, wanted: list[str]) -> None:
    umount = find_program("umount") or "umount"
    more = list(mount_points(host))
    for point in wanted:
        more.remove(point)
    # The latest first; lazily, since a killed process may not have let go of it yet.
    for point in reversed(more):
        command = enter_command(host, [umount, "--lazy", point], {}, "/")
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode != 0:
            raise LabError(f"host {host.name}: {done.stderr.strip()}")


def _empty(root: Path, folder: str, kept: Iterable[str]) -> None:
    """Remove what is in ``folder``, a path below ``root``, except ``kept`` and their parents."""
    for path in list((root / folder.lstrip("/")).iterdir()):
        name = f"{folder}/{path.name}"
        if name in kept:
            if name in KEPT_FOLDERS:
                _empty(root, name, kept)
        elif any(other.startswith(f"{name}/") for other in kept):
            _empty(root, name, kept)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_back(original: Path, folder: Path) -> bool:
    """Write files that differ, in place, since each may be mounted; True if one did."""
    changed = False
    names = {path.name for path in original.iterdir()}
    for path in list(folder.iterdir()):
        if path.name not in names | {_LOG}:
            path.unlink()
    for path in original.iterdir():
        target = folder / path.name
        if not target.is_file() or target.read_bytes() != path.read_bytes():
            target.write_bytes(path.read_bytes())
            shutil.copymode(path, target)
            changed = True
    return changed
