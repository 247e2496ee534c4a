"""The link check between two hosts: whole, and with data that arrive wrong in one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from tests.support.faults import FAULTY_RANKS

pytestmark = [pytest.mark.lab, pytest.mark.ranks, pytest.mark.timeout(240)]
K2 = [sys.executable, "-m", "k2cli"]
NODES = ["--nodes", "k2a,k2b", "--backend", "ring", "--parallel", "tensor"]
# Sums of more than 200 tokens of the toy, whose hidden state has 1,024 bytes, are wrong on rank 0.
FAULT = {
    "PYTHONPATH": os.pathsep.join([str(FAULTY_RANKS), os.environ.get("PYTHONPATH", "")]),
    "FAULTY_RANKS_TRANSFER": f"0 all_sum {200 * 1024} 0",
}


def _deep(lab: Lab, model: Path, fault: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    command = [*K2, "doctor", "--quick", "--deep", "--json", *NODES, "--model", str(model)]
    done = lab.exec("k2a", [*command, "--most-tokens", "300"], fault, timeout_seconds=180)
    assert done.stdout, done.stderr
    [found] = [each for each in json.loads(done.stdout)["checks"] if each["name"] == "link data"]
    return done, found


def _nothing_is_left(lab: Lab, done: subprocess.CompletedProcess[str]) -> None:
    for host in lab.hosts:
        assert lab.process_count(host.name) == 0, (host.name, done.stderr)


@pytest.mark.soak  # a launch does so in test_launch.py
def test_the_doctor_compares_what_two_hosts_send(lab: Lab, toy_k2: Path) -> None:
    done, found = _deep(lab, toy_k2, {})
    assert (done.returncode, found["status"]) == (0, "pass"), done.stderr
    assert "tensor over ring: prompts of up to 300 tokens" in found["detail"]
    assert "link check, second run of 300 tokens" in done.stderr
    _nothing_is_left(lab, done)


def test_a_launch_over_a_link_with_wrong_data_ends_and_names_it(lab: Lab, toy_k2: Path) -> None:
    """By default, since there are two nodes; the prompt is as long as the plan has room for."""
    command = [*K2, "launch", str(toy_k2), *NODES, "--context", "400", "--concurrency", "1"]
    done = lab.exec("k2a", [*command, "--detach"], FAULT, timeout_seconds=180)
    assert done.returncode == 5, done.stderr
    said = " ".join(done.stderr.split())
    assert "link check failed over ring with a prompt of 399 tokens" in said
    assert "rank 1 on k2b has other sums than rank 0 on localhost" in said
    assert "(chunk 1 of 2, position 128, first run, " in said
    assert "k2 doctor --deep" in said
    _nothing_is_left(lab, done)


@pytest.mark.soak
def test_the_doctor_finds_wrong_data(lab: Lab, toy_k2: Path) -> None:
    done, found = _deep(lab, toy_k2, FAULT)
    assert (done.returncode, found["status"]) == (5, "fail"), done.stderr
    assert "with a prompt of 300 tokens" in found["detail"]
    assert found["hint"]
    _nothing_is_left(lab, done)
