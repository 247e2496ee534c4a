"""Faults of machines and links, each once, with real ranks; ``lab.reliability`` runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import Lab
from lab.faults import fault_named
from lab.stories import story_named, try_story
from lab.trial import try_fault

pytestmark = [pytest.mark.lab, pytest.mark.ranks, pytest.mark.timeout(180)]

# Each kind once, over all transports and both placements; scripts/soak runs the whole table.
SELECTION = [
    ("k2-missing", "ring", "pipeline"),
    ("host-key", "ring", "pipeline"),
    ("disk-full", "ring", "pipeline"),
    ("port-taken", "ring", "pipeline"),
    ("mpirun-missing", "mpi4", "pipeline"),
    ("ctrl-c-initialising", "ring", "pipeline"),
    ("ctrl-c-twice-ready", "mpi5", "tensor"),
    ("hangup", "ring", "pipeline"),
    ("launcher-kill", "mpi5", "pipeline"),
    ("supervisor-kill", "ring", "tensor"),
    ("mpirun-kill", "mpi4", "pipeline"),
    ("guard-1-kill", "ring", "pipeline"),
    ("rank-1-kill-early", "ring", "tensor"),
    ("sshd-kill", "ring", "pipeline"),
    ("link-down-decode", "mpi5", "tensor"),
    # A stopped rank is in tests/runtime too; a silent link ends as a cut one does.
    pytest.param("rank-1-stop", "mpi5", "pipeline", marks=pytest.mark.soak),
    pytest.param("link-silent", "ring", "pipeline", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("name", "backend", "strategy"), SELECTION)
def test_a_fault_ends_the_run_everywhere(
    lab: Lab, toy_k2: Path, name: str, backend: str, strategy: str
) -> None:
    outcome = try_fault(lab, fault_named(name), toy_k2, backend, strategy)
    assert outcome.passed, outcome
    assert all(seconds is not None for seconds in outcome.gone_seconds.values()), outcome
    if fault_named(name).stage == "decode":
        assert outcome.client.startswith("end error: "), outcome


@pytest.mark.parametrize(
    ("name", "backend", "strategy"),
    [
        ("second-user-waits", "ring", "pipeline"),
        # tests/cluster restarts runs on one machine.
        pytest.param("restart", "mpi5", "tensor", marks=pytest.mark.soak),
    ],
)
def test_what_takes_longer_than_one_fault(
    lab: Lab, toy_k2: Path, name: str, backend: str, strategy: str
) -> None:
    outcome = try_story(lab, story_named(name), toy_k2, backend, strategy)
    assert outcome.passed, outcome
    assert all(seconds is not None for seconds in outcome.gone_seconds.values()), outcome
