"""The sshd of a host: started, and ended with all its sessions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from lab import home
from lab.errors import LabError
from lab.namespaces import enter_command, listens, processes
from lab.requirements import find_program
from lab.state import HostState

_PORT = 22
_SECONDS = 20.0


def start_sshd(host: HostState, folder: Path) -> None:
    """Start sshd on a host whose files are in ``folder``, unless it runs; wait until it listens.

    Raises:
        LabError: if it does not start.
    """
    if listens(host, _PORT):
        return
    program = find_program("sshd") or "/usr/sbin/sshd"
    log = os.path.normpath(f"{home.HOME}/../lab-ssh/sshd.log")
    command = [program, "-f", home.SSHD_CONFIG, "-E", log]
    done = subprocess.run(
        enter_command(host, command, home.environment(), home.HOME),
        input="",
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        start_new_session=True,
    )
    until = time.monotonic() + _SECONDS
    while done.returncode == 0 and time.monotonic() < until:
        if listens(host, _PORT):
            return
        time.sleep(0.01)
    path = folder / "ssh" / "sshd.log"
    said = path.read_text(errors="replace") if path.is_file() else done.stderr
    raise LabError(f"sshd of {host.name} did not start: {said.strip()[-300:]}")


def end_sshd(host: HostState) -> None:
    """Send SIGKILL to a host's sshd and to all its sessions, and wait until none is left.

    Raises:
        LabError: if one does not end.
    """
    until = time.monotonic() + _SECONDS
    while left := [found for found in processes(host) if found.command.startswith("sshd: ")]:
        if time.monotonic() > until:
            raise LabError(f"sshd of {host.name} does not end: process {left[0].pid}")
        for found in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        time.sleep(0.01)
