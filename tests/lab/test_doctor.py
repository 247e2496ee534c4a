"""The doctor between two hosts, over real ssh: whole, and with a real fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from lab.faults import fault_named

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]


def _doctor(lab: Lab, *arguments: str) -> tuple[int, Mapping[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "k2cli",
        "doctor",
        "--json",
        "--nodes",
        "localhost,k2b",
        *arguments,
    ]
    done = lab.exec("k2a", command, timeout_seconds=120)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_two_hosts_reach_each_other_and_a_recording_does_not_name_them(
    lab: Lab, tmp_path: Path
) -> None:
    status, found = _doctor(lab, "--record", str(tmp_path / "out"))
    failed = [check for check in found["checks"] if check["status"] == "fail"]
    assert (status, failed) == (0, []), failed
    ways = {(reach["source"], reach["target"]): reach for reach in found["reaches"]}
    assert set(ways) == {("localhost", "k2b"), ("k2b", "localhost")}
    assert all(reach["error"] is None and reach["interface"] for reach in ways.values())
    [link] = found["link_measurements"]
    assert (link["backend"], link["kind"], link["error"]) == ("ring", "ethernet", None)
    assert link["all_reduce_seconds"] > 0
    address = lab.host("k2b").address
    for path in (tmp_path / "out").rglob("*.*"):
        text = path.read_text()
        assert "k2b" not in text, path
        assert address not in text, path


def test_another_mlx_there_is_named_with_what_mends_it(lab: Lab) -> None:
    fault_named("mlx-version").act(lab, None)
    status, found = _doctor(lab, "--quick")
    assert status == 5
    [failed] = [check for check in found["checks"] if check["status"] == "fail"]
    assert (failed["name"], failed["node"]) == ("mlx version", "k2b")
    assert failed["hint"] == "k2 cluster prepare --nodes k2b"
