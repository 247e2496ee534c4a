"""Test the command lines of guards and mpirun, the transport, and the search for Open MPI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from k2cli.agent import openmpi
from k2cli.agent.openmpi import OpenMpi, find_openmpi
from k2cli.errors import ClusterError, UsageError
from k2cli.launch.guard_commands import direct_commands, mpi_command
from k2cli.launch.mpi_remote import daemon_command, split_host
from k2cli.launch.transport import choose_transport
from k2cli.nodes.local import LocalNode
from k2cli.nodes.ssh import SshNode

HERE = LocalNode()
SCRATCH = Path("/tmp/k2-x")


def test_a_single_rank_needs_no_transport() -> None:
    assert [choose_transport(name, [HERE]) for name in ("auto", "local", "ring", "mpi")] == [
        "local"
    ] * 4
    with pytest.raises(UsageError, match="starts one rank, not 2"):
        choose_transport("local", [HERE, HERE])


def test_auto_takes_the_ring_where_there_is_no_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert choose_transport("auto", [HERE, HERE]) == "ring"
    with pytest.raises(ClusterError, match="no mpirun") as raised:
        find_openmpi()
    assert raised.value.hint is not None
    assert "/nowhere/python" in raised.value.hint
    assert "openmpi" in raised.value.hint


def test_direct_guards_know_their_rank_and_no_secret() -> None:
    first, second = direct_commands("demo-1", [HERE, SshNode("b", "/b/python")])
    assert (first.node, second.node) == ("localhost", "b")
    assert second.arguments == (
        *("/b/python", "-P", "-m", "k2cli.guard.main", "--k2-run", "demo-1"),
        *("--bootstrap", "bootstrap-{rank}.json", "--rank", "1"),
    )


def test_mpirun_on_this_machine_keeps_to_it() -> None:
    five = mpi_command("demo-1", [HERE, HERE], OpenMpi(Path("/m/mpirun"), 5), SCRATCH)
    four = mpi_command("demo-1", [HERE, HERE], OpenMpi(Path("/m/mpirun"), 4), SCRATCH)
    for command in (five, four):
        assert command.program == "mpirun"
        assert command.arguments.count("k2cli.guard.mpi_slot_process") == 2
        assert ("--allow-run-as-root" in command.arguments) == (os.geteuid() == 0)
        assert command.arguments[command.arguments.index("btl_tcp_if_include") + 1] in ("lo", "lo0")
        assert "--host" not in command.arguments
    assert "--oversubscribe" in four.arguments
    assert "oob_tcp_if_include" in four.arguments
    assert ":OVERSUBSCRIBE" in five.arguments


def test_mpirun_between_machines_starts_each_node_s_python_in_rank_order() -> None:
    nodes = [SshNode("a", "/a/python"), SshNode("b", "/b/python"), SshNode("a", "/a/python")]
    networks = ["10.0.0.0/24", "10.0.1.0/24"]
    mpi = OpenMpi(Path("/m/mpirun"), 5)
    command = mpi_command("demo-1", nodes, mpi, SCRATCH, networks=networks)
    contexts = " ".join(command.arguments).split(" : ")
    slots = [
        f"-np 1 --host {name} /{name}/python -P -m k2cli.guard.mpi_slot_process "
        f"--k2-run demo-1 --rank {rank}"
        for rank, name in enumerate("aba")
    ]
    assert contexts[0].endswith(slots[0])
    assert contexts[1:] == slots[1:]
    assert "--mca btl_tcp_if_include 10.0.0.0/24,10.0.1.0/24" in contexts[0]


def test_mpirun_s_daemon_is_started_where_the_node_has_it() -> None:
    command = ["PATH=/opt/a/bin:$PATH", ";", "/opt/a/bin/orted", "-mca", "x", "/opt/abc"]
    prefixes = {"": "/opt/a", "k2b": "/usr"}
    assert daemon_command(command, "k2b", prefixes, {}) == (
        "PATH=/usr/bin:$PATH ; /usr/bin/orted -mca x /opt/abc"
    )
    assert daemon_command(command, "other", prefixes, {"": "x"}) == " ".join(command)
    assert split_host(["-x", "k2b", "orted", "-d"]) == ("k2b", ["orted", "-d"])


def _program(folder: Path, version: str) -> None:
    (folder / "bin").mkdir()
    path = folder / "bin" / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("HYDRA build details:", "is not Open MPI's"),
        ("mpirun (Open MPI) 4.1.6", "library that MLX needs"),
    ],
)
def test_an_mpi_that_mlx_cannot_use_is_refused(
    version: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path, version)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(openmpi, "_library_of_linker", lambda: None)
    with pytest.raises(ClusterError, match=message):
        find_openmpi()


def test_the_library_is_that_of_the_mpirun_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path, "mpirun (Open MPI) 4.1.6")
    library = tmp_path / "lib" / "x86_64-linux-gnu" / "libmpi.so.40"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert find_openmpi() == OpenMpi(tmp_path / "bin" / "mpirun", 4)
    assert openmpi.find_libmpi() == library
