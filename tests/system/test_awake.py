"""Keeping a Mac awake, with a program in place of ``caffeinate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from k2cli.guard.base import _AWAKE_SECONDS, Guard
from k2cli.launch.specification import RunSpecification
from k2cli.protocol.progress_page import Phase
from k2cli.supervisor import supervisor
from k2cli.system import awake
from k2cli.system.awake import Awake, kept_awake
from tests.support.as_macos import make_program, on_macos
from tests.support.bootstraps import make_assignment, make_bootstrap


@pytest.fixture
def caffeinate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = make_program(tmp_path, "caffeinate", "exec sleep 60")
    monkeypatch.setattr(awake, "_CAFFEINATE", str(program))


def _children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.usefixtures("caffeinate")
def test_a_mac_is_kept_awake_until_the_work_ends() -> None:
    before = len(_children())
    with on_macos():
        with kept_awake():
            assert len(_children()) == before + 1
        assert len(_children()) == before
        one = Awake()
        for wanted in (True, True, False, False, True):
            one.keep(wanted=wanted)
        assert len(_children()) == before + 1
        one.keep(wanted=False)
    assert len(_children()) == before


@pytest.mark.usefixtures("caffeinate")
@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac is kept awake")
def test_other_systems_decide_themselves() -> None:
    before = len(_children())
    with kept_awake():
        assert len(_children()) == before


def test_a_system_without_the_program_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "_CAFFEINATE", f"{os.devnull}/caffeinate")
    with on_macos(), kept_awake():
        pass


@pytest.mark.parametrize(
    ("nodes", "awake"), [(["localhost", "b"], True), (["b"], True), (["localhost"] * 2, False)]
)
async def test_a_mac_that_launched_a_run_on_others_stays_awake(
    nodes: list[str], *, awake: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guards end a run whose supervisor is silent."""
    wanted = [False]
    during: list[bool] = []

    class Run:
        stop = force = stopping = None

        def __init__(self, *arguments: Any) -> None:
            pass

        def take_over(self) -> None:
            pass

        async def run(self) -> None:
            during.append(wanted[-1])

    monkeypatch.setattr(Awake, "keep", lambda self, *, wanted: seen.append(wanted))
    seen = wanted
    monkeypatch.setattr(supervisor, "Supervisor", Run)
    monkeypatch.setattr(supervisor, "read_record", lambda folder: SimpleNamespace(live=True))
    monkeypatch.setattr(supervisor, "obey_signals", lambda *arguments: None)
    assignment = make_assignment(size=len(nodes), nodes=nodes)
    specification = RunSpecification([make_bootstrap(assignment)], "x")
    monkeypatch.setattr(supervisor, "read_specification", lambda folder: specification)
    await supervisor._supervise(tmp_path, lambda event: None, None)
    assert (during, wanted[-1]) == ([awake], False)


class _Guard(Guard):
    def emit(self, event: Any) -> None:
        raise AssertionError(event)

    def on_rank_message(self, message: Any) -> None:
        raise AssertionError(message)


async def test_a_mac_stays_awake_while_it_works_or_another_one_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run on several machines fails if one of them sleeps."""
    wanted: list[bool] = []
    monkeypatch.setattr(Awake, "keep", lambda self, *, wanted: seen.append(wanted))
    seen = wanted

    def of(nodes: list[str], phase: Phase, seconds: float) -> bool:
        guard = _Guard(make_bootstrap(make_assignment(size=len(nodes), nodes=nodes)), "x")
        guard._stay_awake("busy", 0.0)
        guard._stay_awake(phase, seconds)
        return wanted[-1]

    assert of(["a", "b"], "idle", 10 * _AWAKE_SECONDS)
    assert of(["a", "a"], "busy", 10 * _AWAKE_SECONDS)
    assert of(["a"], "idle", _AWAKE_SECONDS / 2)
    assert not of(["a", "a"], "idle", 10 * _AWAKE_SECONDS)
