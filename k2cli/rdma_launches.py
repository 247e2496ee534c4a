"""Launches over JACCL on this machine since it was started, counted by the guards.

The system does not give RDMA's protection domains back when a process ends, so only a few launches
work until the machine is restarted: two or three by most reports, ten by one. Each attempt of a run
leaves an empty file in a folder that is named after the boot; so guards of several ranks count one
attempt once, without a lock.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from k2cli.files import private_folder, read_regular
from k2cli.settings import state_directory

SAFE_LAUNCHES = 2
"""Launches since the machine was started that worked for everybody who reported a number."""

PREFERRED_SETTINGS = ("JACCL_RANK", "JACCL_COORDINATOR", "JACCL_IBV_DEVICES")
"""Variables of JACCL's own library, which it prefers to those of MLX that k2 sets: a user may have
set them for another program (mlx/distributed/jaccl/lib/jaccl/jaccl.cpp, ``from_env``)."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SYSCTL = ("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")
_SYSCTL_SECONDS = 5.0
_ID_BYTES = 200
_UNSAFE = re.compile(r"[^A-Za-z0-9-]")


def boot_id() -> str:
    """Return an id of this start of the machine; "" if the system does not tell it."""
    try:
        if sys.platform == "darwin":
            done = subprocess.run(
                _SYSCTL, capture_output=True, text=True, timeout=_SYSCTL_SECONDS, check=True
            )
            text = done.stdout
        else:
            text = read_regular(_BOOT_ID, _ID_BYTES).decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return _UNSAFE.sub("", text.strip())[:64]


def count_launch(run_id: str, attempt: int) -> int:
    """Count an attempt of a run; return the number since the machine was started.

    Returns:
        The number with this one; 0 if the system does not tell when it was started.

    Raises:
        OSError: if k2's folder of states cannot be written.
    """
    boot = boot_id()
    if not boot:
        return 0
    base = private_folder(state_directory() / "rdma-launches")
    for other in base.iterdir():
        if other.name != boot:
            shutil.rmtree(other, ignore_errors=True)
    folder = private_folder(base / boot)
    (folder / f"{run_id}-{attempt}").touch(mode=0o600)
    return _files(folder)


def launches_since_boot() -> int:
    """Return the number of launches over JACCL since the machine was started."""
    boot = boot_id()
    return _files(state_directory() / "rdma-launches" / boot) if boot else 0


def launches_text(count: int) -> str:
    """Describe a count, and what it may mean: for warnings of guards and of the doctor."""
    return (
        f"{count} launches over JACCL since this machine was started; macOS does not give RDMA's "
        "protection domains back when a process ends, and later launches may fail or hang"
    )


def _files(folder: Path) -> int:
    with suppress(OSError):
        return sum(1 for _ in folder.iterdir())
    return 0
