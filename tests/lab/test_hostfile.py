"""The same hostfile given to MLX's own launcher and to k2: the ranks are told the same.

JACCL needs RDMA, which is not here; what its ranks find in their environment is all that a launcher
does for it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from lab.runs import Talk, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]
RANK = "tests.lab.environment_rank"
MLX = "from mlx._distributed_utils.launch import main; main()"
K2 = """
import sys
from k2cli.supervisor.start import launch_here
from k2cli.launch.request import LaunchRequest
from k2cli.launch.prepare import prepare_run
model, backend, rank = sys.argv[1:]
request = LaunchRequest(model, cluster="pair", transport=backend, worker=rank, force=True)
launch_here(prepare_run(request).record, print, lambda first: None)
"""
RDMA: dict[str, list[list[Any]]] = {
    # Two cables between the two machines, and one.
    "jaccl": [[None, ["rdma_en3", "rdma_en5"]], [["rdma_en4", "rdma_en2"], None]],
    "ring": [[], []],
}


def _hostfile(lab: Lab, backend: str) -> dict[str, Any]:
    hosts = [
        {"ssh": host.name, "ips": [host.address], "rdma": rdma}
        for host, rdma in zip(lab.hosts, RDMA[backend], strict=True)
    ]
    return {"backend": backend, "envs": ["MLX_METAL_FAST_SYNCH=1"], "hosts": hosts}


def _files(lab: Lab) -> list[Path]:
    return [host.home / f"environment-{rank}.json" for rank, host in enumerate(lab.hosts)]


def _told(lab: Lab) -> list[dict[str, Any]]:
    """Return the environment that each rank recorded, without ports, which launchers choose."""
    found = []
    for path in _files(lab):
        told = json.loads(path.read_text())
        path.unlink()
        if "MLX_HOSTFILE" in told:
            addresses = [[_address(text) for text in node] for node in told["MLX_HOSTFILE"]]
            told["MLX_HOSTFILE"] = addresses
        if "MLX_JACCL_COORDINATOR" in told:
            told["MLX_JACCL_COORDINATOR"] = _address(told["MLX_JACCL_COORDINATOR"])
        found.append(told)
    return found


def _address(text: str) -> str:
    address, _, port = text.rpartition(":")
    assert 1024 < int(port) < 65536
    return address


@pytest.mark.parametrize("backend", ["jaccl", pytest.param("ring", marks=pytest.mark.soak)])
def test_ranks_are_told_what_mlx_s_launcher_tells_them(
    lab: Lab, toy_k2: Path, backend: str
) -> None:
    path = lab.host("k2a").home / "hosts.json"
    path.write_text(json.dumps(_hostfile(lab, backend)))
    arguments = ["--hostfile", "hosts.json", "--", sys.executable, "-P", "-m", RANK]
    done = lab.exec("k2a", [sys.executable, "-c", MLX, *arguments])
    assert done.returncode == 0, done.stderr
    expected = _told(lab)
    assert [told["MLX_RANK"] for told in expected] == ["0", "1"]
    k2 = [sys.executable, "-m", "k2cli"]
    done = lab.exec("k2a", [*k2, "cluster", "import", "hosts.json", "--name", "pair", "--offline"])
    assert done.returncode == 0, done.stderr
    talk = Talk(lab.start("k2a", [sys.executable, "-c", K2, str(toy_k2), backend, RANK]))
    assert wait_for(lambda: all(path.exists() for path in _files(lab)), 30), talk.text
    assert _told(lab) == expected
    lab.exec("k2a", [*k2, "stop", "--all"])
    talk.wait_end(20)
