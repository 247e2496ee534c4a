"""Nodes: this machine, and one over a program that stands in for ssh."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.agent import facts as node_facts
from k2cli.agent import run_folder
from k2cli.agent.facts import NodeFacts
from k2cli.cluster.node_lookup import node_named
from k2cli.errors import ClusterError
from k2cli.nodes import ssh_connection
from k2cli.nodes.local import LocalNode
from k2cli.nodes.node import Completed, addresses
from k2cli.nodes.ssh import SshNode, _resolved
from k2cli.nodes.ssh_connection import close_connections

FAKE_SSH = """#!/bin/sh
# An ssh that "connects" to this machine: what follows the name is for a shell.
while [ "$1" != -- ]; do shift; done
exec sh -c "$3"
"""


@pytest.fixture
def _ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path = tmp_path / "ssh"
    path.write_text(FAKE_SSH)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield
    close_connections()


def test_names_of_this_machine_need_no_ssh() -> None:
    for name in ("localhost", "127.0.0.1", "LOCALHOST", socket.gethostname()):
        assert node_named(name).name == "localhost"
    assert not node_named("studio-2").is_local
    assert addresses([LocalNode(), LocalNode()]) == ["127.0.0.1"] * 2


def test_files_of_a_run_are_private() -> None:
    LocalNode().write_file("demo-1", "bootstrap-0.json", b"{}")
    path = run_folder.run_folder("demo-1") / "bootstrap-0.json"
    assert path.stat().st_mode & 0o777 == 0o600
    LocalNode().remove_bootstraps("demo-1")
    assert not path.parent.exists()


async def test_a_local_process_talks_over_pipes_in_a_session_of_its_own() -> None:
    program = "import os; print(os.getsid(0) == os.getpid(), input())"
    process = await LocalNode().start([sys.executable, "-c", program])
    output, _ = await asyncio.wait_for(process.communicate(b"hello\n"), 20)
    assert output == b"True hello\n"
    with pytest.raises(ClusterError, match="cannot be started"):
        await LocalNode().start(["/no/such/program"])


def test_commands_have_a_time_limit() -> None:
    with pytest.raises(ClusterError, match="did not answer"):
        LocalNode().run(["sleep", "30"], timeout_seconds=0.2)


@pytest.mark.usefixtures("_ssh")
async def test_a_node_over_ssh_answers_as_this_machine_does() -> None:
    node = SshNode("b")
    assert node.facts() == node_facts.facts()
    assert isinstance(node.facts(), NodeFacts)
    assert len(node.free_ports(2)) == 2
    assert node.port_holder("127.0.0.1", node.choose_port("127.0.0.1", 8080)) is None
    node.write_file("demo-1", "bootstrap-0.json", b"secret 'quoted' $HOME")
    path = run_folder.run_folder("demo-1") / "bootstrap-0.json"
    assert path.read_bytes() == b"secret 'quoted' $HOME"
    node.remove_bootstraps("demo-1")
    assert not path.exists()
    assert node.processes_of_run("demo-1") == []
    assert node.kill_run("demo-1") == []
    assert node.memory().name == "b"
    process = await node.start(["printf", "%s", "a b'c"], {"K2_X": "1"})
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert output.strip() == b"a b'c"


@pytest.mark.usefixtures("_ssh")
@pytest.mark.parametrize("is_short", [True, False])
def test_a_node_is_reached_again_after_the_system_has_removed_the_folder_of_the_connection(
    monkeypatch: pytest.MonkeyPatch, is_short: bool
) -> None:
    """At the end of a session it removes what programs keep there, and a supervisor goes on."""
    with tempfile.TemporaryDirectory(dir="/tmp") as session:
        if not is_short:
            monkeypatch.setattr(ssh_connection, "_LONGEST_SOCKET_PATH", 0)
        monkeypatch.setenv("XDG_RUNTIME_DIR", session)
        connection = ssh_connection.connection_to("b")
        first = connection._connect()
        assert first.is_relative_to(session) == is_short
        shutil.rmtree(session if is_short else first.parent)
        second = connection._connect()
        assert second.parent.is_dir()
        assert second != first
        if not is_short:
            shutil.rmtree(second.parent)
        Path(session).mkdir(exist_ok=True)


def _found(*addresses: str) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    kinds = {True: socket.AF_INET6, False: socket.AF_INET}
    return [(kinds[":" in each], socket.SOCK_STREAM, 6, "", (each, 0)) for each in addresses]


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        (("fe80::10d8:5a1f:b3c2:77e1", "192.168.1.20"), "192.168.1.20"),
        (("fe80::10d8:5a1f:b3c2:77e1", "2001:db8::5"), "2001:db8::5"),
        (("10.0.0.5", "10.0.0.6"), "10.0.0.5"),
    ],
)
def test_the_address_of_a_name_of_bonjour_means_something_elsewhere(
    found: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS may give the link-local address first (mobile-shell/mosh#765)."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: _found(*found))
    assert _resolved("studio-2", f"{chosen}.local") == chosen


def test_a_mac_that_keeps_ssh_from_a_folder_has_a_setting_for_it() -> None:
    said = b"[Errno 1] Operation not permitted: '/Volumes/Models/K2/config.json'\n"
    error = SshNode("studio-2")._agent_error("weights", Completed(1, b"", said))
    assert "Volumes/Models" in error.message
    assert "full disk access" in (error.hint or "")
    other = SshNode("studio-2")._agent_error("weights", Completed(1, b"", b"ValueError: x"))
    assert other.hint == "k2 cluster prepare --nodes studio-2"
