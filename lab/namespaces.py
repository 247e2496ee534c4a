"""Make the namespaces of a host, enter them, and list the processes there.

A host is the process tree below its init. ``unshare`` and ``nsenter`` of util-linux do the system
calls. The PID namespace of each process tells exactly which host it belongs to.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.requirements import find_program
from lab.state import HostState, is_alive, start_time

_INIT = Path(__file__).with_name("init.py")
_RELAY = Path(__file__).with_name("relay.py")
_START_SECONDS = 20.0
_END_SECONDS = 10.0
_LISTENING = "0A"  # proc(5), /proc/net/tcp
_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")


@dataclass(frozen=True, slots=True)
class LabProcess:
    """A process of a host; ``pid`` as seen from outside, ``inner_pid`` as seen in the host."""

    pid: int
    inner_pid: int
    command: str
    stopped: bool

    @property
    def is_service(self) -> bool:
        """True for services of the host: init, sshd and sessions, shared ssh, the relay."""
        words = self.command
        own = self.inner_pid == 1 or f"{_RELAY} " in words
        return own or words.startswith("sshd: ") or self.is_shared_ssh

    @property
    def is_shared_ssh(self) -> bool:
        """True for the process that holds a connection of ssh for later commands."""
        return self.command.endswith("[mux]")


def _program(name: str) -> str:
    path = find_program(name)
    if path is None:
        raise LabError(f"program {name} not found", "scripts/lab up")
    return path


def start_host(
    name: str, orders: Mapping[str, Any], folder: Path, owner: int | None
) -> tuple[HostState, subprocess.Popen[bytes]]:
    """Start a host's init in new namespaces.

    Args:
        name: name of the host.
        orders: instructions for ``lab.init``, without the host name.
        folder: folder for the instructions and the log of init.
        owner: read end of a pipe; the host ends when the other end is closed. None: no owner.

    Returns:
        The host, whose mounts are made, and the parent process of its init.

    Raises:
        LabError: if the host does not become ready; the message has its last output.
    """
    path = folder / "orders.json"
    path.write_text(json.dumps({**orders, "hostname": name}))
    ready, ready_write = os.pipe()
    given = [ready_write] if owner is None else [ready_write, owner]
    command = [_program("unshare"), *_NAMESPACES, "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    command += [sys.executable, "-I", str(_INIT), str(path), *map(str, given)]
    with (folder / "init.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=given,
            start_new_session=True,
        )
    os.close(ready_write)
    try:
        readable, _, _ = select.select([ready], [], [], _START_SECONDS)
        said = os.read(ready, 64) if readable else b""
    finally:
        os.close(ready)
    if said != b"ready\n":
        process.kill()
        process.wait()
        lines = (folder / "init.log").read_text(errors="replace").strip().splitlines()
        raise LabError(f"host {name} did not start: {lines[-1] if lines else 'no output'}")
    return _state_of(name, process.pid), process


def _state_of(name: str, parent: int) -> HostState:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    pid = int(text[0])
    started = start_time(pid)
    if started is None:
        raise LabError(f"host {name} ended at once")
    return HostState(name, pid, started)


def end_host(host: HostState) -> None:
    """Send SIGKILL to a host's init, which ends all processes of the host.

    Raises:
        LabError: if the init still exists after the time limit.
    """
    if is_alive(host):
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.pid, signal.SIGKILL)
    until = time.monotonic() + _END_SECONDS
    while is_alive(host):
        if time.monotonic() > until:
            raise LabError(f"host {host.name} (process {host.pid}) does not end")
        time.sleep(0.01)


def enter_command(
    host: HostState, arguments: Sequence[str], environment: Mapping[str, str], folder: str
) -> list[str]:
    """Return the command line that runs ``arguments`` in a host with only this environment."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    enter = [_program("nsenter"), "--target", str(host.pid), *_NAMESPACES, "--"]
    # Background jobs of a shell ignore SIGINT, and those of nohup SIGHUP: programs of a host must
    # not inherit that.
    default = ["--default-signal=INT", "--default-signal=HUP"]
    return [*enter, "/usr/bin/env", "-i", *default, f"--chdir={folder}", *settings, *arguments]


def run_ip(host: HostState, commands: Sequence[str]) -> None:
    """Run a batch of ``ip`` commands in a host's network.

    Raises:
        LabError: if a command fails.
    """
    nsenter = [_program("nsenter"), "--target", str(host.pid), "--net", "--"]
    done = subprocess.run(
        [*nsenter, _program("ip"), "-batch", "-"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
    )
    if done.returncode != 0:
        raise LabError(f"host {host.name}: {done.stderr.strip()} ({'; '.join(commands)})")


def processes(host: HostState) -> list[LabProcess]:
    """Return the processes in the host's PID namespace, without zombies."""
    try:
        wanted = os.readlink(f"/proc/{host.pid}/ns/pid")
    except OSError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (process := _look_at(int(entry.name), wanted)) is not None:
            found.append(process)
    return sorted(found, key=lambda process: process.inner_pid)


def _look_at(pid: int, namespace: str) -> LabProcess | None:
    try:
        if os.readlink(f"/proc/{pid}/ns/pid") != namespace:
            return None
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None  # ended meanwhile, or not readable
    state = status["State"][0]
    if state in "ZX":
        return None
    command = b" ".join(words).decode(errors="replace") or f"[{status['Name']}]"
    return LabProcess(pid, int(status["NSpid"].split()[-1]), command.strip(), state == "T")


def listens(host: HostState, port: int) -> bool:
    """Return True if a process in the host's network listens on an IPv4 TCP port."""
    lines = Path(f"/proc/{host.pid}/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return any(f[3] == _LISTENING and f[1].endswith(f":{port:04X}") for f in fields)


def mount_points(host: HostState) -> list[str]:
    """Return the mount points of a host."""
    lines = Path(f"/proc/{host.pid}/mounts").read_text().splitlines()
    return [line.split()[1].replace("\\040", " ") for line in lines]
