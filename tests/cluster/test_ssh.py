"""Nodes over the real OpenSSH: a server of the test's own on this machine, and its failures."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from k2cli import __version__
from k2cli.cluster import ssh_connection
from k2cli.cluster.ssh import SshNode
from k2cli.cluster.ssh_connection import close_connections
from k2cli.errors import ClusterError, NodeAccessError

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="OpenSSH's client and server are needed"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A running sshd and the files of it and of its client."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def write_configuration(self, more: str = "") -> None:
        """Hosts: ``b`` is the server; the others fail each in its own way."""
        common = (
            f"  HostName 127.0.0.1\n  Port {self.port}\n  IdentitiesOnly yes\n"
            f"  IdentityFile {self.folder}/key\n"
        )
        known = f"  UserKnownHostsFile {self.folder}/known_hosts\n  HostKeyAlias b\n"
        (self.folder / "config").write_text(
            f"Host b\n{more}{common}{known}"
            f"Host stranger\n{common}  UserKnownHostsFile {self.folder}/none\n"
            f"Host denied\n{common.replace('/key', '/wrong')}{known}"
            f"Host nobody\n  HostName 127.0.0.1\n  Port 9\n"
            f"Host changed\n{more}{common}  UserKnownHostsFile {self.folder}/old_hosts\n"
            f"  HostKeyAlias b\n"
        )


def _key(path: Path) -> str:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, timeout=20)
    return path.with_suffix(".pub").read_text()


def _start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv PYTHONPATH={os.environ['PYTHONPATH']}\n"
    )
    assert SSHD is not None
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's empty folder, which it wants as root
    return subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("key", "wrong", "old"):
        _key(folder / name)
    (folder / "authorized").write_text((folder / "key.pub").read_text())
    (folder / "known_hosts").write_text("b " + _key(folder / "host_key"))
    (folder / "old_hosts").write_text("b " + (folder / "old.pub").read_text())
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    # ssh finds its configuration by the password database, not by HOME.
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    wrapper.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = Server(folder, port, _start(folder, port))
    _wait_for(port)
    yield server
    for child in psutil.Process(server.process.pid).children(recursive=True):
        child.kill()
    server.process.kill()
    server.process.wait(10)


def _wait_for(port: int) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("sshd did not start")


@pytest.fixture
def server(_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("PATH", f"{_server.folder}/bin:{os.environ['PATH']}")
    _server.write_configuration()
    yield _server
    close_connections()


def _masters() -> list[psutil.Process]:
    folder = str(ssh_connection._socket_folder())
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == "ssh" and folder in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _sockets() -> list[Path]:
    connections = ssh_connection._connections.values()
    return [c._socket for c in connections if c._socket is not None]


async def test_commands_share_a_connection_that_ends_with_the_work(server: Server) -> None:
    node = SshNode("b")
    assert node.facts().k2_version == __version__
    (path,) = _sockets()
    assert path.exists()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert node.run(["cat"], b"a 'b' $HOME\n").stdout == b"a 'b' $HOME\n"
    assert node.run(["sh", "-c", "exit 3"]).status == 3
    assert node.address() == "127.0.0.1"
    assert _sockets() == [path]
    # What lives long has a connection of its own, and closing the shared one leaves it alone.
    process = await node.start(["cat"], {"K2_X": "1"})
    close_connections()
    assert not path.exists()
    output, _ = await process.communicate(b"still there")
    assert output == b"still there"


@pytest.mark.parametrize(
    ("name", "kind", "message", "hint"),
    [
        ("nobody", ClusterError, "nothing answers ssh there .*Connection refused", "Remote Login"),
        ("no-such-host.invalid", ClusterError, "its name is unknown", "HostName"),
        ("denied", NodeAccessError, r"did not let you in: .*Permission denied", "ssh-copy-id"),
        ("stranger", ClusterError, "host key of node stranger is not known", "ssh stranger true"),
        ("changed", ClusterError, "another host key", "ssh-keygen"),
    ],
)
def test_each_failure_says_what_is_wrong_and_what_mends_it(
    server: Server, name: str, kind: type[ClusterError], message: str, hint: str
) -> None:
    with pytest.raises(kind, match=message) as raised:
        SshNode(name).run(["true"])
    assert hint in (raised.value.hint or "")
    assert raised.value.exit_code == (4 if name == "denied" else 5)


def test_a_changed_key_is_refused_even_where_the_user_checks_none(server: Server) -> None:
    server.write_configuration("  StrictHostKeyChecking no\n")
    with pytest.raises(ClusterError, match="another host key"):
        SshNode("changed").run(["true"])
    assert SshNode("b").run(["true"]).status == 0


def test_a_users_habits_for_working_by_hand_are_not_in_the_way(server: Server) -> None:
    server.write_configuration(
        "  RemoteCommand tmux attach\n  RequestTTY force\n  LocalForward 1 localhost:1\n"
        "  ControlMaster auto\n  ControlPath /no/such/folder/%C\n  LogLevel QUIET\n"
    )
    assert SshNode("b").run(["printf", "x"]).stdout == b"x"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stuck_connection_is_replaced(server: Server, how: signal.Signals) -> None:
    node = SshNode("b")
    node.run(["true"])
    (path,) = _sockets()
    (master,) = [p for p in _masters() if str(path) in " ".join(p.cmdline())]
    master.send_signal(how)
    if how == signal.SIGSTOP:
        with pytest.raises(ClusterError, match="did not answer within 1 s to 'true'"):
            node.run(["true"], timeout_seconds=1)
        master.kill()
    assert node.run(["printf", "again"]).stdout == b"again"


def test_a_command_that_takes_too_long_is_given_up(server: Server) -> None:
    node = SshNode("b")
    with pytest.raises(ClusterError, match="node b did not answer within 1 s to 'sleep'"):
        node.run(["sleep", "5"], timeout_seconds=1)
    assert node.run(["printf", "on"]).stdout == b"on"


def test_an_interpreter_that_is_gone_is_looked_for_again(server: Server) -> None:
    node = SshNode("b", python="/gone/python")
    assert node.facts().k2_version == __version__
    assert node.python != "/gone/python"


def test_a_node_without_k2_says_so(server: Server, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho '/x: No module named k2cli' >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(ClusterError, match="k2 is not installed on node b") as raised:
        SshNode("b", python=str(bare)).facts()
    assert raised.value.hint == "k2 cluster prepare --nodes b"
