"""GPUs of a host: what is read of them, and which rank gets which."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.errors import K2Error
from k2cli.planning.hardware.gpus import CONTEXT_BYTES, list_gpus, parse_gpus, parse_processes
from k2cli.planning.hardware.machine import NodeMemory, cuda_machine, on_gpus, share_machines
from tests.support.gpu_host import H200_MIB, H200_RESERVED_MIB, MIB, UUIDS, GpuHost, make_gpu_host

FREE = (H200_MIB - H200_RESERVED_MIB) * MIB


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuHost:
    return make_gpu_host(tmp_path / "host", 2, monkeypatch)


def places(nodes: list[NodeMemory]) -> list[int | None]:
    return [node.gpu.index if node.gpu else None for node in nodes]


def test_each_rank_gets_a_gpu_and_all_of_its_memory(host: GpuHost) -> None:
    machine = host.machine()
    ranks = share_machines([machine, machine])
    assert places(ranks) == [0, 1]
    assert [rank.limit_bytes for rank in ranks] == [FREE - CONTEXT_BYTES] * 2
    assert [rank.memory_bytes for rank in ranks] == [FREE] * 2
    assert ranks[1].gpu is not None
    assert (ranks[1].gpu.uuid, ranks[1].gpu.label) == (UUIDS[1], "GPU 1 (NVIDIA H200)")


def test_more_ranks_than_gpus_share_and_pay_for_a_context_each(host: GpuHost) -> None:
    machine = host.machine()
    ranks = share_machines([machine] * 3)
    assert places(ranks) == [0, 1, 0]
    assert ranks[0].limit_bytes == ranks[2].limit_bytes == (FREE - 2 * CONTEXT_BYTES) // 2
    assert ranks[1].limit_bytes == FREE - CONTEXT_BYTES
    assert "shared by 2 ranks" in ranks[0].limit_source


def test_memory_of_other_processes_counts_and_its_gpu_comes_last(host: GpuHost) -> None:
    host.use(0, 4321, "/opt/venv/bin/python3", 60_000)
    machine = host.machine()
    assert places(on_gpus([machine])) == [1]
    assert places(on_gpus([machine, machine])) == [1, 0]
    taken = on_gpus([machine, machine])[1]
    assert taken.limit_bytes == FREE - 60_000 * MIB - CONTEXT_BYTES
    assert "62.9 GB being used by python3 (4321) 62.9 GB" in taken.limit_source
    assert places(on_gpus([machine, machine], most=1)) == [1, 1]


def test_a_desktop_on_the_first_gpu_does_not_change_the_order(host: GpuHost) -> None:
    host.use(0, 900, "/usr/lib/xorg/Xorg", 300)
    assert places(on_gpus([host.machine()])) == [0]


@pytest.mark.parametrize(
    ("column", "text", "obstacle"),
    [(7, "Enabled", "MIG"), (6, "Prohibited", "Prohibited")],
)
def test_a_gpu_that_cannot_be_used_whole_is_left_out(
    host: GpuHost, column: int, text: str, obstacle: str
) -> None:
    host.set(0, column, text)
    machine = host.machine()
    assert places(on_gpus([machine, machine])) == [1, 1]
    assert obstacle in machine.gpus[0].obstacle


def test_an_exclusive_gpu_is_left_out_while_a_process_uses_it(host: GpuHost) -> None:
    host.set(0, 6, "Exclusive_Process")
    assert places(on_gpus([host.machine()] * 2)) == [0, 1]
    host.use(0, 77, "trainer", 500)
    machine = host.machine()
    assert places(on_gpus([machine] * 2)) == [1, 1]
    assert "trainer (77)" in machine.gpus[0].obstacle


def test_an_exclusive_gpu_is_not_shared_by_ranks(host: GpuHost) -> None:
    host.set(0, 6, "Exclusive_Process")
    assert places(on_gpus([host.machine()] * 3)) == [0, 1, 1]
    assert places(on_gpus([host.machine()] * 2, most=1)) == [0, 1]


def test_only_gpus_that_the_user_left_visible_are_there(host: GpuHost) -> None:
    host.visible = [1]
    machine = host.machine()
    assert places(on_gpus([machine, machine])) == [1, 1]
    host.visible = []
    with pytest.raises(K2Error, match="finds no GPU"):
        host.machine()


def test_cuda_counts_in_another_order_than_nvidia_smi(host: GpuHost) -> None:
    host.visible = [1, 0]
    assert [gpu.name.index for gpu in host.machine().gpus] == [1, 0]
    assert places(on_gpus([host.machine()] * 2)) == [0, 1]


def test_without_nvidia_smi_mlx_alone_tells(host: GpuHost) -> None:
    (host.folder / "nvidia-smi").write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert list_gpus() == []
    ranks = on_gpus([host.machine()] * 2)
    assert places(ranks) == [0, 1]
    assert ranks[0].gpu is not None
    assert ranks[0].gpu.uuid == UUIDS[0]


def test_a_slice_of_mig_is_used_as_cuda_shows_it(host: GpuHost) -> None:
    slices = [{**host.devices()[0], "uuid": "GPU-of-the-slice", "total_memory": 20_000 * MIB}]
    (rank,) = on_gpus([cuda_machine("localhost", slices)])
    assert rank.gpu is not None
    assert rank.gpu.uuid == ""  # nothing that k2 could set: the user has chosen it


def test_of_devices_that_nvidia_smi_does_not_list_only_the_first_can_be_used(host: GpuHost) -> None:
    """Without a UUID a rank computes on CUDA's first device, whichever k2 has planned for it."""
    slices = [{**device, "uuid": f"GPU-slice-{device['uuid']}"} for device in host.devices()]
    machine = cuda_machine("localhost", slices)
    assert places(on_gpus([machine] * 2)) == [0, 0]
    assert "CUDA_VISIBLE_DEVICES" in machine.gpus[1].obstacle


@pytest.mark.parametrize(
    ("total", "free", "limit"),
    [
        ("[Unknown Error]", "[GPU is lost]", FREE - CONTEXT_BYTES),
        ("143771 MiB", "5", FREE - CONTEXT_BYTES),
        ("600", "600", 0),  # less than the driver keeps
    ],
)
def test_memory_that_nvidia_smi_cannot_tell_is_what_mlx_says(
    host: GpuHost, total: str, free: str, limit: int
) -> None:
    host.set(0, 3, total)
    host.set(0, 4, free)
    gpu = host.machine().gpus[0]
    assert gpu.limit_bytes == limit
    assert gpu.memory_bytes >= 0


@pytest.mark.parametrize(
    "program",
    ["exec yes 0123456789", "sleep 60", "sleep 60 & exit 3", "kill -STOP $$", "exit 1"],
)
def test_an_nvidia_smi_that_hangs_or_never_ends_is_done_without(
    host: GpuHost, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr("k2cli.planning.hardware.gpus._QUERY_SECONDS", 1.0)
    (host.folder / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
    assert list_gpus() == []
    assert [gpu.name.uuid for gpu in host.machine().gpus] == list(UUIDS[:2])


def test_memory_that_is_shared_with_the_processor(host: GpuHost) -> None:
    host.set(0, 3, "[N/A]")
    host.set(0, 4, "[N/A]")
    host.visible = [0]
    (rank,) = on_gpus([host.machine()])
    assert rank.gpu is not None
    assert rank.gpu.index == 0
    assert 0 < rank.limit_bytes < H200_MIB * MIB  # the memory of this machine


def test_text_in_another_form_is_left_out() -> None:
    assert parse_gpus("NVIDIA-SMI has failed because it could not reach the driver.\n") == []
    assert parse_gpus("0, GPU-1, NVIDIA\x1b[31m, 10, 9, 1, Default, [N/A]")[0].name.name == "NVIDIA"
    (found,) = parse_processes("GPU-1, 12, [N/A], /bin/a,b\x07\nnonsense\n").values()
    assert [(user.pid, user.name, user.used_bytes) for user in found] == [(12, "a,b", None)]
