"""A real sshd on this machine for tests, with a client configuration and a home of its own.

Hosts: ``b`` is the server, and ``behind`` the same through a jump over ``b``. The others fail each
in its own way: ``stranger``
(host key unknown), ``changed`` (another host key known), ``denied`` (wrong key), ``nobody`` (a
port that nothing listens on).
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
MISSING = SSHD is None or shutil.which("ssh") is None


@dataclass(frozen=True, slots=True)
class Server:
    """A running sshd and its files; commands start in ``home``."""

    folder: Path
    port: int

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def write_configuration(self, more: str = "") -> None:
        """Write the client's configuration; ``more`` is added to the reachable hosts."""
        common = (
            f"  HostName 127.0.0.1\n  Port {self.port}\n  IdentitiesOnly yes\n"
            f"  IdentityFile {self.folder}/key\n"
        )
        known = f"  UserKnownHostsFile {self.folder}/known_hosts\n  HostKeyAlias b\n"
        (self.folder / "config").write_text(
            f"Host b\n{more}{common}{known}"
            f"Host behind\n{common}{known}  ProxyJump b\n"
            f"Host stranger\n{common}  UserKnownHostsFile {self.folder}/none\n"
            f"Host denied\n{common.replace('/key', '/wrong')}{known}"
            f"Host nobody\n  HostName 127.0.0.1\n  Port 9\n"
            f"Host changed\n{more}{common}  UserKnownHostsFile {self.folder}/old_hosts\n"
            f"  HostKeyAlias b\n"
        )


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Start a server whose files are in ``folder``."""
    for name in ("key", "wrong", "old", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=20)
    (folder / "authorized").write_text((folder / "key.pub").read_text())
    (folder / "known_hosts").write_text("b " + (folder / "host_key.pub").read_text())
    (folder / "old_hosts").write_text("b " + (folder / "old.pub").read_text())
    # ssh finds its configuration by the password database, not by HOME.
    _write_script(folder / "bin" / "ssh", f'exec {shutil.which("ssh")} -F {folder}/config "$@"')
    home = shlex.quote(str(folder / "home"))
    (folder / "home").mkdir()
    _write_script(folder / "forced", f'cd {home} && HOME={home} exec sh -c "$SSH_ORIGINAL_COMMAND"')
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = _start(folder, port)
    try:
        _wait_for(port)
        yield Server(folder, port)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait(10)


def _write_script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv PYTHONPATH={os.environ['PYTHONPATH']}\nForceCommand {folder}/forced\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd requires this empty folder as root
    assert SSHD is not None
    return subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL
    )


def _wait_for(port: int) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("sshd did not start")
