"""Nodes over the real OpenSSH: its shared connection, and each way in which it fails."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from k2cli import __version__
from k2cli.cluster.description import Cluster, ClusterNode, save_cluster
from k2cli.cluster.discovery import ask_machine
from k2cli.cluster.node_lookup import recorded_interpreter
from k2cli.errors import ClusterError, NodeAccessError
from k2cli.nodes import ssh_connection
from k2cli.nodes.interpreter import find_interpreter
from k2cli.nodes.local import LocalNode
from k2cli.nodes.node import Completed
from k2cli.nodes.ssh import SshNode
from k2cli.nodes.ssh_connection import close_connections
from k2cli.supervisor import end_processes
from tests.support.ssh_server import Server


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


async def test_commands_share_a_connection_that_ends_with_the_work(ssh_server: Server) -> None:
    node = SshNode("b", python="/gone/python")  # and another one is found
    assert node.facts().k2_version == __version__
    assert node.python != "/gone/python"
    (path,) = _sockets()
    assert path.exists()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert node.run(["cat"], b"a 'b' $HOME\n").stdout == b"a 'b' $HOME\n"
    assert node.run(["sh", "-c", "exit 3"]).status == 3
    assert node.address() == "127.0.0.1"
    assert SshNode("behind").run(["printf", "y"]).stdout == b"y"
    assert path in _sockets()
    # What lives long has a connection of its own, and closing the shared one leaves it alone.
    process = await node.start(["cat"], {"K2_X": "1"})
    close_connections()
    assert not path.exists()
    output, _ = await process.communicate(b"still there")
    assert output.strip() == b"still there"


@pytest.mark.parametrize("shell", ["fish", "tcsh", "zsh"])
async def test_the_login_shell_of_a_node_may_be_any(ssh_server: Server, shell: str) -> None:
    # omnistat#281, rootshell#408: fish and csh read a command line in other ways than sh.
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    forced = ssh_server.folder / "forced"
    plain = forced.read_text()
    forced.write_text(plain.replace("exec sh -c", f"exec {shell} -c"))
    try:
        node = SshNode("b")
        odd = "a 'b' $HOME `x` \\ ! {c,d} ~ * \" é"
        assert node.run(["printf", "%s", odd]).stdout.decode() == odd
        assert node.facts().k2_version == __version__
        process = await node.start(["cat"], {"K2_X": "1 '2'"})
        output, _ = await process.communicate(b"there")
        assert output.strip() == b"there"
    finally:
        forced.write_text(plain)


@pytest.mark.parametrize(
    "greeting", ["date +%N; echo $$", "printf 'no end %s' $$", "cat /dev/null"]
)
async def test_output_of_start_up_files_is_no_answer(ssh_server: Server, greeting: str) -> None:
    # fish-shell#3473: a fortune, the time or a process id: another line with each command.
    forced = ssh_server.folder / "forced"
    plain = forced.read_text()
    forced.write_text(plain.replace("cd ", f"{greeting}\ncd ", 1))
    try:
        node = SshNode("b")
        assert node.run(["uname", "-s"]).stdout.decode().strip() in ("Linux", "Darwin")
        assert node.run(["printf", "x\\n\\ny"]).stdout == b"x\n\ny"
        assert node.facts().k2_version == __version__
        assert ask_machine(node).error is None
        process = await node.start(["printf", "first\\n"])
        output, _ = await process.communicate()
        assert output.splitlines()[-1] == b"first"
        forced.write_text(plain.replace("cd ", "echo bye; exit 0\ncd ", 1))
        with pytest.raises(ClusterError, match="start-up file on node b ends the shell"):
            node.run(["uname", "-s"])
    finally:
        forced.write_text(plain)


@pytest.mark.parametrize(
    ("name", "kind", "message", "hint"),
    [
        ("nobody", ClusterError, "nothing answers ssh there .*Connection refused", "Remote Login"),
        ("no-such-host.invalid", ClusterError, "its name is unknown", "HostName"),
        ("denied", NodeAccessError, r"denied access: .*Permission denied", "ssh-copy-id"),
        ("stranger", ClusterError, "host key of node stranger is not known", "ssh stranger true"),
        ("changed", ClusterError, "another host key", "ssh-keygen"),
    ],
)
def test_each_failure_has_a_cause_and_a_hint(
    ssh_server: Server, name: str, kind: type[ClusterError], message: str, hint: str
) -> None:
    with pytest.raises(kind, match=message) as raised:
        SshNode(name).run(["true"])
    assert hint in (raised.value.hint or "")
    assert raised.value.exit_code == (4 if name == "denied" else 5)


def test_a_changed_key_is_refused_even_where_the_user_checks_none(ssh_server: Server) -> None:
    ssh_server.write_configuration("  StrictHostKeyChecking no\n")
    with pytest.raises(ClusterError, match="another host key"):
        SshNode("changed").run(["true"])
    assert SshNode("b").run(["true"]).status == 0


def test_a_users_habits_for_working_by_hand_are_not_in_the_way(ssh_server: Server) -> None:
    ssh_server.write_configuration(
        "  RemoteCommand tmux attach\n  RequestTTY force\n  LocalForward 1 localhost:1\n"
        "  ControlMaster auto\n  ControlPath /no/such/folder/%C\n  LogLevel QUIET\n"
    )
    assert SshNode("b").run(["printf", "x"]).stdout == b"x"


def test_a_shell_that_greets_every_login_is_understood(ssh_server: Server) -> None:
    greeting = ssh_server.home / "greeting"
    greeting.write_text("Welcome!\n/not/a/path\n")
    try:
        assert SshNode("b").facts().k2_version == __version__
        assert SshNode("b").run(["printf", "%s", "a\nb"]).stdout == b"a\nb"
    finally:
        greeting.unlink()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stuck_connection_is_replaced(ssh_server: Server, how: signal.Signals) -> None:
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


def test_a_command_that_takes_too_long_is_given_up(ssh_server: Server) -> None:
    node = SshNode("b")
    with pytest.raises(ClusterError, match="node b did not answer within 1 s to 'sleep'"):
        node.run(["sleep", "5"], timeout_seconds=1)
    assert node.run(["printf", "on"]).stdout == b"on"


async def test_nobody_waits_long_for_a_node_that_does_not_answer(
    ssh_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that takes connections and says nothing: as a link that loses everything looks."""
    monkeypatch.setattr(end_processes, "REACH_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with (ssh_server.folder / "config").open("a") as file:
            file.write(f"Host mute\n  HostName 127.0.0.1\n  Port {mute.getsockname()[1]}\n")
        with pytest.raises(ClusterError, match="it did not answer within 1 s"):
            SshNode("mute").reach(1)
        nodes = {"mute": SshNode("mute"), "b": SshNode("b"), "localhost": LocalNode()}
        left = await end_processes.RunKiller("demo-1", nodes).kill(answered={"b"})
    assert left == {
        "mute": "node mute cannot be reached: it did not answer within 1 s; "
        "its guard ends the processes there"
    }
    # A connection that was there and does not answer any more is another matter than a new one.
    (path,) = _sockets()
    (master,) = [p for p in _masters() if str(path) in " ".join(p.cmdline())]
    master.send_signal(signal.SIGSTOP)
    with pytest.raises(ClusterError, match=r"node b cannot be reached: .* within 1 s"):
        SshNode("b").reach(1)
    master.kill()


def test_a_recorded_interpreter_is_tried_first_and_not_believed(
    ssh_server: Server, tmp_path: Path
) -> None:
    asked: list[str] = []

    def run(arguments: Sequence[str], input: bytes | None = None, /) -> Completed:
        asked.append(arguments[0])
        return SshNode("b").run(arguments, input)

    found = find_interpreter("b", run, sys.executable)
    assert (found.executable, found.k2, asked) == (sys.executable, __version__, [sys.executable])
    another = tmp_path / "python"
    report = json.dumps({**msgspec.to_builtins(found), "digest": "older"})
    another.write_text(f"#!/bin/sh\necho '{report}'\n")
    another.chmod(0o755)
    assert find_interpreter("b", run, str(another)) == found
    assert asked[1] == str(another)
    save_cluster(Cluster("pair", (ClusterNode("a"), ClusterNode("b", python=str(another)))))
    assert recorded_interpreter("b") == str(another)
    assert SshNode("b").python == sys.executable


def test_a_node_without_k2_says_so(ssh_server: Server, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho '/x: No module named k2cli' >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(ClusterError, match="k2 is not installed on node b") as raised:
        SshNode("b", python=str(bare)).facts()
    assert raised.value.hint == "k2 cluster prepare --nodes b"
