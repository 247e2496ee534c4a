"""Processes on standby: they serve the launch that they are for, and outlive nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from k2cli.cluster import agent
from k2cli.cluster.launch_request import LaunchRequest
from k2cli.cluster.launching import launch_detached
from k2cli.cluster.nodes import python_environment
from k2cli.cluster.preparation import prepare_run
from k2cli.cluster.standby import standing_by
from k2cli.cluster.stopping import stop_run
from k2cli.settings import runs_directory
from tests.cluster.harness import wait_until

pytestmark = pytest.mark.ranks
SECONDS = 20.0
TWO = ("localhost", "localhost")
_HOLD = """
import sys, time
from k2cli.cluster.launch_request import LaunchRequest
from k2cli.cluster.standby import standing_by
with standing_by(LaunchRequest("demo", nodes=("localhost", "localhost"), transport="ring"), detach=True) as standby:
    print(standby.run_id, flush=True)
    time.sleep(60)
"""  # noqa: E501


def standing(run_id: str) -> list[str]:
    return [process.command for process in agent.processes_of_run(run_id)]


def test_a_launch_that_comes_to_nothing_leaves_no_process_and_no_folder() -> None:
    request = LaunchRequest("demo", nodes=TWO, transport="ring")
    with standing_by(request, detach=True) as standby:
        assert standby.run_id is not None
        run_id = standby.run_id
        wait_until(lambda: len(standing(run_id)) == 4, SECONDS, "two guards and two ranks")
        assert not (runs_directory() / run_id).exists()
    assert standing(run_id) == []
    assert standby.take() is None


def test_a_launcher_killed_while_it_plans_leaves_no_process() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", _HOLD],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **python_environment()},
    )
    assert launcher.stdout is not None
    try:
        run_id = launcher.stdout.readline().strip()
        wait_until(lambda: len(standing(run_id)) == 4, SECONDS, "two guards and two ranks")
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()
    wait_until(lambda: not standing(run_id), SECONDS, "the end of all that stood by")


# The supervisor outlives the object that started it: that is what it is for.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.parametrize("lost", ["nobody", "a guard", "the supervisor"])
def test_a_launch_uses_what_stands_by_and_does_without_what_is_gone(
    lost: str, toy_k2: Path
) -> None:
    request = LaunchRequest(str(toy_k2), nodes=TWO, transport="ring", context_length=512)
    with standing_by(request, detach=True) as standby:
        assert standby.run_id is not None
        run_id = standby.run_id
        wait_until(lambda: len(standing(run_id)) == 4, SECONDS, "two guards and two ranks")
        before = {process.pid for process in agent.processes_of_run(run_id)}
        prepared = prepare_run(request, run_id=run_id)
        _kill(lost, standby, run_id)
        record = launch_detached(prepared, lambda event: None, lambda first: None, standby)
    try:
        assert (record.run_id, record.state) == (run_id, "ready")
        ranks = {rank.rank_pid for rank in record.ranks}
        kept = {"nobody": 2, "a guard": 1, "the supervisor": 0}[lost]
        assert len(ranks & before) == kept
        assert len(agent.processes_of_run(run_id)) == 4
    finally:
        stop_run(record)
    assert standing(run_id) == []


def _kill(lost: str, standby: object, run_id: str) -> None:
    if lost == "a guard":
        guards = [p for p in agent.processes_of_run(run_id) if "runtime.guard" in p.command]
        os.kill(guards[-1].pid, signal.SIGKILL)
        wait_until(lambda: len(standing(run_id)) == 2, SECONDS, "the end of a guard and its rank")
    elif lost == "the supervisor":
        process: subprocess.Popen[bytes] = standby._process  # type: ignore[attr-defined]
        process.kill()
        wait_until(lambda: not standing(run_id), SECONDS, "the end of all that stood by")


@pytest.mark.parametrize(
    "request_",
    [
        LaunchRequest("demo", nodes=TWO),  # perhaps by mpirun, whose ranks get its environment
        LaunchRequest("demo", nodes=("localhost", "elsewhere"), transport="ring"),
        LaunchRequest("demo", cluster="home"),
        LaunchRequest("demo", plan_file=Path("plan.json")),
        LaunchRequest("demo", wait_seconds=60),
        LaunchRequest("demo", fast_synch=True),
    ],
)
def test_nothing_stands_by_where_more_is_to_be_decided(request_: LaunchRequest) -> None:
    with standing_by(request_, detach=True) as standby:
        assert standby.run_id is None
