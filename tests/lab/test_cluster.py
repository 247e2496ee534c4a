"""``k2 cluster`` between hosts that are apart: describing them, and making a bare one ready."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import k2cli
from k2cli.agent.own_wheel import build_own_wheel
from k2cli.nodes.install import wanted_versions
from lab import Lab
from lab.sshd import end_sshd

pytestmark = pytest.mark.lab
K2 = [sys.executable, "-m", "k2cli"]
# In the host's own view of the disk; python3 is a link to one of these.
PYTHONS = "$(ls -d /usr/bin/python3.?? /usr/local/bin/python3.?? 2>/dev/null)"
HIDE_PYTHONS = f"for path in {PYTHONS}; do mount --bind /dev/null $path; done"
SHOW_PYTHONS = f"for path in {PYTHONS}; do umount $path; done"
TARGET = ["cluster", "prepare", "--nodes", "k2b"]


def _k2(lab: Lab, *arguments: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    return lab.exec("k2a", [*K2, *arguments], environment, timeout_seconds=seconds)


@pytest.fixture
def bare(lab: Lab) -> Lab:
    """The lab with a second host that has a Python, but no k2."""
    config = lab.host("k2b").folder / "ssh" / "sshd_config"
    kept = [line for line in config.read_text().splitlines() if "PYTHONPATH" not in line]
    config.write_text("\n".join(kept) + "\n")
    end_sshd(lab.host("k2b").state)
    lab.start_sshd("k2b")
    # An environment that has k2 installed from its sources finds it without a PYTHONPATH too.
    sources = str(Path(k2cli.__file__).resolve().parent)
    hidden = lab.exec("k2b", ["mount", "-t", "tmpfs", "none", sources])
    assert hidden.returncode == 0, hidden.stderr
    return lab


def test_two_hosts_are_described_with_the_link_between_them(lab: Lab) -> None:
    done = _k2(lab, "cluster", "init", "k2a", "k2b", "--name", "pair", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["cluster"]
    assert [(node["name"], node["hostname"]) for node in found["nodes"]] == [
        ("localhost", "k2a"),
        ("k2b", "k2b"),
    ]
    (link,) = found["links"]
    assert (link["kind"], link["rdma"]) == ("ethernet", False)
    assert link["first_address"] == lab.host("k2a").address
    assert link["second_address"] == lab.host("k2b").address
    exported = json.loads(_k2(lab, "cluster", "export", "pair").stdout)
    assert exported["hosts"][0] == {"ssh": "k2a", "ips": [link["first_address"]], "rdma": []}
    lab.link_down()
    shown = _k2(lab, "cluster", "show", "pair")
    assert "node k2b cannot be reached" in shown.stdout
    lab.link_up()
    assert _k2(lab, "cluster", "remove", "pair").returncode == 0
    # Nothing of it stays, not even a connection.
    assert [lab.process_count(host.name) for host in lab.hosts] == [0, 0]


def test_a_bare_host_says_what_is_missing_and_a_full_disk_says_so(bare: Lab) -> None:
    done = _k2(bare, "cluster", "init", "k2b", "--name", "bare")
    assert done.returncode == 0, done.stderr
    assert "k2 is not installed on node k2b; k2 cluster prepare --nodes k2b" in done.stderr
    hidden = bare.exec("k2b", ["sh", "-c", HIDE_PYTHONS])
    assert hidden.returncode == 0, hidden.stderr
    done = _k2(bare, *TARGET)
    assert done.returncode == 5
    assert "node k2b has no Python 3.11 or newer, and no uv to fetch one" in done.stderr
    bare.exec("k2b", ["sh", "-c", SHOW_PYTHONS])
    bare.exec("k2b", ["mkdir", "-p", ".k2/incoming"])
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", ".k2/incoming"]
    assert bare.exec("k2b", mount).returncode == 0
    done = _k2(bare, *TARGET)
    assert done.returncode == 5
    assert "the disk of node k2b is full" in done.stderr
    assert bare.exec("k2b", ["ls", ".k2/incoming", ".k2/envs"]).stdout.split() == [
        ".k2/envs:",
        ".k2/incoming:",
    ]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All wheels that k2 needs, for hosts that reach no package index."""
    folder = tmp_path_factory.mktemp("wheels")
    name, data = build_own_wheel()
    own = folder / name
    own.write_bytes(data)
    pins = [f"{package}=={version}" for package, version in wanted_versions().items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    done = subprocess.run(
        [*command, str(own), *pins], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"the wheels cannot be downloaded: {done.stderr.strip()[-200:]}")
    return folder


@pytest.fixture
def still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code as it is now: an edit in the middle of the test would make another k2 of it."""
    package = Path(k2cli.__file__).parent
    shutil.copytree(package, tmp_path / "k2cli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(package.parent / "pyproject.toml", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.soak
@pytest.mark.usefixtures("still")
def test_a_bare_host_becomes_usable_by_one_command(bare: Lab, wheels: Path) -> None:
    done = _k2(bare, *TARGET)
    assert done.returncode == 5
    assert "hint: k2 cluster prepare --wheels FOLDER" in done.stderr
    _k2(bare, "cluster", "init", "k2a", "k2b", "--name", "pair")
    # Killed in the middle, it leaves nothing in the way of the next one.
    command = [*K2, "cluster", "prepare", "pair", "--wheels", str(wheels)]
    killed = bare.start("k2a", command, {"PYTHONPATH": os.environ["PYTHONPATH"]})
    time.sleep(6)
    for found in bare.processes("k2a"):
        os.kill(found.pid, signal.SIGKILL)
    killed.communicate()
    done = _k2(bare, "cluster", "prepare", "pair", "--wheels", str(wheels), "--json", seconds=600)
    assert done.returncode == 0, done.stderr
    local, other = json.loads(done.stdout)["nodes"]
    assert (local["status"], other["status"]) == ("ready", "installed")
    assert other["python"] == "/run/home/.k2/env/bin/python"
    # Again it is there, and the description knows where.
    done = _k2(bare, "cluster", "prepare", "pair", "--json")
    assert [node["status"] for node in json.loads(done.stdout)["nodes"]] == ["ready", "ready"]
    shown = json.loads(_k2(bare, "cluster", "show", "pair", "--json").stdout)
    assert shown["cluster"]["nodes"][1]["python"] == other["python"]
    assert shown["problems"] == {}
    # An installation that fails leaves the one that works.
    (next(wheels.glob("numpy-*.whl"))).unlink()
    done = _k2(bare, *TARGET, "--force", "--wheels", str(wheels), seconds=600)
    assert done.returncode == 5
    assert "No matching distribution found for numpy" in done.stderr
    assert _k2(bare, *TARGET).returncode == 0


@pytest.mark.soak
def test_a_link_that_falls_silent_is_noticed(lab: Lab) -> None:
    program = (
        "from k2cli.nodes.ssh import SshNode; n = SshNode('k2b'); n.run(['true']);"
        "print('up', flush=True); input(); n.run(['sleep', '60'], timeout_seconds=90)"
    )
    watching = subprocess.Popen(
        lab.command("k2a", [sys.executable, "-c", program]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert watching.stdout.readline() == "up\n"
    lab.link.set(silent=True)
    started = time.monotonic()
    _, said = watching.communicate("\n", timeout=60)
    assert "k2b" in said.splitlines()[-1]
    assert "ClusterError" in said.splitlines()[-1]
    # Three questions of ssh without an answer, three seconds apart.
    assert time.monotonic() - started < 30
