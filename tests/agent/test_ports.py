"""TCP ports of this machine: free ones, and the holder of a taken one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from k2cli.agent import ports
from k2cli.errors import ClusterError
from k2cli.nodes.local import LocalNode
from k2cli.settings import RUN_OPTION
from tests.support.as_macos import on_macos


def test_free_ports_are_different_and_below_those_of_outgoing_connections() -> None:
    found = ports.free_ports(50)
    assert len(set(found)) == 50
    assert max(found) < 32_768


def test_a_taken_port_is_refused_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        holder = ports.port_holder("127.0.0.1", port)
        assert holder is not None
        assert str(os.getpid()) in holder
        assert ports.choose_port("127.0.0.1", port) != port
    assert ports.port_holder("127.0.0.1", port) is None
    holder = ports.port_holder("192.0.2.1", port)
    assert holder is not None
    assert "no address of this machine" in holder
    with pytest.raises(ClusterError, match=r"192\.0\.2\.1"):
        LocalNode().choose_port("192.0.2.1", 8080)


def test_the_holder_of_a_port_is_found_where_the_table_of_the_system_needs_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(kind: str) -> None:
        raise psutil.AccessDenied(0)

    monkeypatch.setattr(psutil, "net_connections", refused)  # as on macOS
    with socket.create_server(("127.0.0.1", 0)) as server, on_macos():
        holder = ports.port_holder("127.0.0.1", server.getsockname()[1])
    assert holder is not None
    assert holder.startswith(f"process {os.getpid()} ")


@pytest.mark.parametrize(
    ("run", "named"),
    [
        ("demo-1a2b", "run demo-1a2b of k2 (process {})"),
        ("\x1b[2Jdemo\n-1a2b", "process {} (python -c "),
    ],
)
def test_a_port_of_a_run_is_named_by_the_run(run: str, named: str) -> None:
    """Its command line, cut off in the middle, does not help anybody; any program may have one."""
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); "
    code += "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    words = ["python", "-c", code, RUN_OPTION, run, "--more"]
    with subprocess.Popen(
        words, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        holder = ports.port_holder("127.0.0.1", int(process.stdout.readline()))
        process.kill()
    assert holder is not None
    assert holder.startswith(named.format(process.pid))
    assert holder.isprintable()


def test_a_command_line_is_shown_without_what_controls_a_terminal() -> None:
    assert ports._described(7, ["a\x1b[2Jb", "c\nd"]) == "process 7 (ab c d)"
    assert ports._described(7, [RUN_OPTION, "\x1b[2J"]).isprintable()
