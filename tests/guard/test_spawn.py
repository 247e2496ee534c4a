"""The environment that a guard gives its rank."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from k2cli.gpu_name import GpuName
from k2cli.guard.spawn import spawn_rank
from k2cli.protocol import Bootstrap
from tests.support.bootstraps import make_assignment, make_bootstrap

BOOTSTRAP = make_bootstrap(make_assignment())


async def _output_of_a_rank(bootstrap: Bootstrap) -> bytes:
    rank = await spawn_rank(bootstrap, "show")
    shown, _ = await rank.process.communicate()
    rank.connection.close()
    rank.page.close()
    return shown


@pytest.mark.parametrize(
    ("gpu", "visible"),
    [
        (GpuName(1, "GPU-22", "NVIDIA H200"), "GPU-22"),
        (GpuName(0, "", "NVIDIA H200 MIG 1g.18gb"), "0,1"),
        (None, "0,1"),
    ],
)
def test_a_rank_sees_the_gpu_that_the_plan_gave_it_and_no_other(
    gpu: GpuName | None, visible: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "show.py").write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")

    assert asyncio.run(_output_of_a_rank(replace(BOOTSTRAP, gpu=gpu))).decode().strip() == visible


def test_variables_of_the_user_or_a_hostfile_do_not_undo_what_the_launch_has_decided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    foreign = {
        "NCCL_COMM_ID": "0.0.0.0:4444", "NCCL_SOCKET_FAMILY": "AF_INET6",
        "NCCL_HOST_IP": "0.0.0.0", "NCCL_SOCKET_IFNAME": "eth", "NCCL_NVLS_ENABLE": "0",
    }  # fmt: skip
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    (tmp_path / "show.py").write_text(program)
    assignment = replace(
        BOOTSTRAP.assignment, size=2, nodes=["a", "a"], transport="nccl",
        nccl_coordinator="127.0.0.1:5000", nccl_interface="lo",
    )  # fmt: skip
    bootstrap = replace(
        BOOTSTRAP,
        assignment=assignment,
        gpu=GpuName(1, "GPU-22"),
        environment={"CUDA_VISIBLE_DEVICES": "0", "NCCL_COMM_ID": "0.0.0.0:1", "OTHER": "kept"},
    )
    found = json.loads(asyncio.run(_output_of_a_rank(bootstrap)))
    assert "NCCL_COMM_ID" not in found
    expected = {
        "CUDA_VISIBLE_DEVICES": "GPU-22", "OTHER": "kept", "NCCL_SOCKET_FAMILY": "AF_INET",
        "NCCL_HOST_IP": "127.0.0.1", "NCCL_SOCKET_IFNAME": "=lo", "NCCL_NVLS_ENABLE": "0",
    }  # fmt: skip
    assert expected.items() <= found.items()


def test_jaccl_s_own_variables_of_the_user_do_not_replace_those_of_the_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("JACCL_RANK", "JACCL_COORDINATOR", "JACCL_IBV_DEVICES"):
        monkeypatch.setenv(name, "of another program")
    monkeypatch.setenv("JACCL_RING", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    (tmp_path / "show.py").write_text(program)
    devices = [[None, "rdma_en5"], ["rdma_en5", None]]
    assignment = make_assignment(
        size=2, transport="jaccl", jaccl_coordinator="10.0.0.1:5000", jaccl_devices=devices
    )
    shown = asyncio.run(_output_of_a_rank(make_bootstrap(assignment)))
    seen = json.loads(shown)
    assert (seen["MLX_RANK"], seen["MLX_JACCL_COORDINATOR"]) == ("0", "10.0.0.1:5000")
    assert sorted(name for name in seen if name.startswith("JACCL_")) == ["JACCL_RING"]
