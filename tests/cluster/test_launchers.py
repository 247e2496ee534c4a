"""Command lines of guards and of mpirun, and finding Open MPI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from k2cli.cluster import openmpi
from k2cli.cluster.launchers import choose_backend, direct_commands, mpi_commands
from k2cli.cluster.nodes import LocalNode
from k2cli.cluster.openmpi import OpenMpi, find_openmpi
from k2cli.cluster.ssh import SshNode
from k2cli.errors import ClusterError, UsageError

HERE = LocalNode()
SCRATCH = Path("/tmp/k2-x")


def test_a_single_rank_needs_no_back_end() -> None:
    assert [choose_backend(name, [HERE]) for name in ("auto", "local", "ring", "mpi")] == [
        "local"
    ] * 4
    with pytest.raises(UsageError, match="starts one rank, not 2"):
        choose_backend("local", [HERE, HERE])
    with pytest.raises(UsageError, match="jaccl"):
        choose_backend("jaccl", [HERE, HERE])


def test_auto_takes_the_ring_where_there_is_no_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert choose_backend("auto", [HERE, HERE]) == "ring"
    with pytest.raises(ClusterError, match="no mpirun") as raised:
        find_openmpi()
    assert raised.value.hint is not None
    assert "k2cli[mpi]" in raised.value.hint


def test_direct_guards_know_their_rank_and_no_secret() -> None:
    first, second = direct_commands("demo-1", [HERE, SshNode("b")])
    assert (first.node, second.node) == ("localhost", "b")
    assert second.arguments == (
        *(sys.executable, "-P", "-m", "k2cli.runtime.guard", "--run", "demo-1"),
        *("--bootstrap", "bootstrap-{rank}.json", "--rank", "1"),
    )


def test_mpirun_on_this_machine_keeps_to_it() -> None:
    (five,) = mpi_commands("demo-1", [HERE, HERE], OpenMpi(Path("/m/mpirun"), 5), SCRATCH)
    (four,) = mpi_commands("demo-1", [HERE, HERE], OpenMpi(Path("/m/mpirun"), 4), SCRATCH)
    for command in (five, four):
        assert command.ranks == (0, 1)
        assert "--rank" not in command.arguments
        assert ("--allow-run-as-root" in command.arguments) == (os.geteuid() == 0)
        assert command.arguments[command.arguments.index("btl_tcp_if_include") + 1] in ("lo", "lo0")
        assert "--host" not in command.arguments
    assert "--oversubscribe" in four.arguments
    assert "oob_tcp_if_include" in four.arguments
    assert ":OVERSUBSCRIBE" in five.arguments


def test_mpirun_over_ssh_gets_hosts_in_rank_order() -> None:
    nodes = [SshNode("a"), SshNode("a"), SshNode("b")]
    (command,) = mpi_commands("demo-1", nodes, OpenMpi(Path("/m/mpirun"), 5), SCRATCH)
    assert command.arguments[command.arguments.index("--host") + 1] == "a:2,b:1"
    with pytest.raises(UsageError, match="a,b,a") as raised:
        mpi_commands("demo-1", [nodes[0], nodes[2], nodes[0]], OpenMpi(Path("/m"), 5), SCRATCH)
    assert raised.value.hint == "--nodes a,a,b"


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
