"""``k2 cluster`` over the real OpenSSH, with this machine as the other one too."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from k2cli import __version__
from k2cli.agent import self_report
from k2cli.agent.own_wheel import build_own_wheel, own_digest
from k2cli.cli import build_app
from k2cli.errors import ClusterError, K2Error, NodeAccessError, UsageError
from k2cli.nodes.install import missing
from k2cli.nodes.interpreter import report_of
from k2cli.nodes.ssh import SshNode
from tests.support.ssh_server import Server


def _k2(*arguments: str) -> str:
    """Run ``k2 cluster`` in this process; its stdout. Errors are raised."""
    done = CliRunner().invoke(build_app(), ["cluster", *arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_machines_are_asked_shown_exported_and_forgotten(ssh_server: Server) -> None:
    found = json.loads(_k2("init", "localhost", "b", "--name", "pair", "--json"))
    nodes = {node["name"]: node for node in found["cluster"]["nodes"]}
    assert found["schema_version"] == 1
    assert list(nodes) == ["localhost", "b"]
    assert nodes["b"]["memory_bytes"] == nodes["localhost"]["memory_bytes"] > 2**30
    assert nodes["b"]["python"] == nodes["localhost"]["python"]
    assert "lo" in nodes["b"]["interfaces"] or "lo0" in nodes["b"]["interfaces"]
    assert json.loads(_k2("list", "--json"))["clusters"] == [found["cluster"]]
    shown = json.loads(_k2("show", "--json"))
    assert shown["cluster"] == found["cluster"]
    assert shown["activity"].keys() == {"localhost", "b"}
    drawn = _k2("show", "--offline")
    assert "pair: 2 nodes" in drawn
    assert "● b" in drawn
    with pytest.raises(UsageError, match="cluster 'pair' already exists"):
        _k2("init", "b", "--name", "pair")
    _k2("remove", "pair")
    assert json.loads(_k2("list", "--json"))["clusters"] == []


def test_a_hostfile_comes_back_with_its_environment(tmp_path: Path) -> None:
    hosts = [{"ssh": "b", "ips": ["10.0.0.1"], "rdma": []}]
    given = {"backend": "ring", "envs": ["A=1"], "hosts": hosts}
    (tmp_path / "hosts.json").write_text(json.dumps(given))
    assert "not asked yet" in _k2("import", str(tmp_path / "hosts.json"), "--offline")
    assert json.loads(_k2("export")) == given


@pytest.mark.parametrize(
    ("hosts", "kind", "message"),
    [
        (("nobody",), ClusterError, "nothing answers ssh there"),
        (("denied", "localhost"), NodeAccessError, "denied access"),
        (("nobody", "stranger"), ClusterError, r"2 machines do not answer \(nobody, stranger\)"),
        (("b", "b"), UsageError, "'b' names a machine that is already in the list"),
        (("a b",), UsageError, "'a b' cannot be the name of a node"),
    ],
)
def test_a_cluster_of_machines_that_do_not_answer_is_not_saved(
    ssh_server: Server, hosts: tuple[str, ...], kind: type[K2Error], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _k2("init", *hosts, "--name", "x")
    assert json.loads(_k2("list", "--json"))["clusters"] == []


def test_a_node_that_has_all_of_it_is_left_as_it_is(ssh_server: Server) -> None:
    done = json.loads(_k2("prepare", "--nodes", "b", "--json"))
    (node,) = done["nodes"]
    assert node["status"] == "ready"
    assert f"k2 {__version__}" in node["detail"]
    assert not (ssh_server.home / ".k2").exists()
    assert report_of(SshNode("b").run, "/no/python") is None
    assert missing(None) == "nothing is installed"


def test_cleaning_a_machine_where_nothing_was_left(ssh_server: Server) -> None:
    (report,) = json.loads(_k2("clean", "--nodes", "b", "--json"))["nodes"]
    assert (report["node"], report["problem"], report["cleared"]) == ("b", "", [])


def test_prepare_refuses_what_it_cannot_mean(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are no wheels in"):
        _k2("prepare", "--nodes", "b", "--wheels", str(tmp_path))
    with pytest.raises(UsageError, match="both given"):
        _k2("prepare", "pair", "--nodes", "b")
    with pytest.raises(UsageError, match="has an empty name"):
        _k2("prepare", "--nodes", ",")


@pytest.mark.parametrize("name", ["-x", "-oProxyCommand=x", "b\n-x"])
def test_what_ssh_would_take_for_an_option_never_reaches_it(name: str) -> None:
    for arguments in (["prepare", f"--nodes=b,{name}"], ["clean", f"--nodes={name}"],
                      ["init", "--", "b", name]):  # fmt: skip
        with pytest.raises(UsageError, match=f"'{name}' cannot be the name of a node"):
            _k2(*arguments)


def test_the_wheel_is_this_very_code_and_fits_its_record(tmp_path: Path) -> None:
    name, data = build_own_wheel()
    assert name == f"k2cli-{__version__}-0{own_digest()}-py3-none-any.whl"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(tmp_path)
    info = tmp_path / f"k2cli-{__version__}.dist-info"
    recorded = {}
    for line in (info / "RECORD").read_text().splitlines():
        path, digest, _ = line.split(",")
        recorded[path] = digest
    files = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.*")}
    assert {path for path, file in files.items() if file.is_file()} <= recorded.keys()
    for path, digest in recorded.items():
        if digest:
            raw = hashlib.sha256((tmp_path / path).read_bytes()).digest()
            assert digest == "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    (tmp_path / "k2cli" / ".DS_Store").write_bytes(b"Finder")  # a Mac whose user looked at it
    files_there = self_report.package_files(tmp_path / "k2cli")
    assert self_report.files_digest(files_there) == own_digest()
    assert "planning/hardware/hardware.toml" in files_there
    assert "Requires-Dist: mlx-lm" in (info / "METADATA").read_text()
