"""Test ``--restart on-failure``: the run returns on the same port, or is given up."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from k2cli.agent import run_processes
from k2cli.launch.restart_policy import Attempts, RestartPolicy
from tests.commands.test_run_commands import k2, runs
from tests.support.harness import supervised, wait_until

pytestmark = pytest.mark.ranks


def test_failures_add_up_unless_a_run_has_served_for_long() -> None:
    attempts = Attempts(RestartPolicy("on-failure"))
    assert [attempts.failed(cause, 1.0) for cause in "abc"] == [2.0, 10.0, None]
    assert attempts.first_cause == "a"
    attempts = Attempts(RestartPolicy("on-failure"))
    assert [attempts.failed("x", 601.0) for _ in range(5)] == [2.0] * 5
    assert Attempts(RestartPolicy()).failed("x", 1e6) is None


def launch(toy: Path, backend: str) -> str:
    """Start a run of two ranks with restarts; return its URL."""
    options = ("--nodes", "localhost,localhost", "--backend", backend, "--context", "256")
    done = k2("launch", str(toy), *options, "--restart", "on-failure", "--detach", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["url"])


def kill(rank: int, process: str) -> None:
    """Kill a process, and wait until the run has noticed it."""
    (run,) = runs()
    os.kill(run["ranks"][rank][process], signal.SIGKILL)
    count = len(run["attempts"]) + 1
    wait_until(
        lambda: len(runs()[0]["attempts"]) == count or runs()[0]["state"] == "failed", 30, "the end"
    )


def wait_again(url: str) -> None:
    """Wait until the run serves again at the same URL."""
    wait_until(lambda: runs()[0]["state"] == "ready", 60, "the next attempt")
    assert runs()[0]["url"] == url
    assert httpx.get(f"{url}/health").status_code == 200
    status = httpx.get(f"{url}/v1/status").json()
    assert (status["state"], status["attempt"]) == ("ready", len(runs()[0]["attempts"]) + 1)
    assert all(rank["loaded_bytes"] > 0 for rank in status["ranks"])


def assert_told_why(url: str) -> None:
    """Assert that the API answers with the cause during the pause."""
    answer = httpx.get(f"{url}/health")
    assert answer.status_code == 503
    assert "rank 1 on localhost failed" in answer.json()["cause"]
    status = httpx.get(f"{url}/v1/status").json()
    assert (status["state"], status["cause"]) == ("restarting", answer.json()["cause"])
    assert "\nk2_run_ready 0.0\n" in httpx.get(f"{url}/metrics").text


def test_whatever_ends_it_a_run_comes_back_and_is_given_up_after_three_failures() -> None:
    """Use scripted ranks and short pauses, over the ring."""
    policy = RestartPolicy("on-failure", first_delay_seconds=0.3, factor=1.0)
    with supervised("ring", restart=policy) as run:
        for who in ("rank-1", "guard-0", "rank-0"):
            run.wait_ready()
            count = len(run.record.attempts) + 1
            os.kill(run.pid_of(who), signal.SIGKILL)
            wait_until(
                lambda count=count: (
                    len(run.record.attempts) == count or run.record.state == "failed"
                ),
                30,
                "the end",
            )
        assert run.supervisor.wait(20) == 5
        assert not run.processes()
        record = run.record
    assert record.state == "failed"
    assert "3 failures in a row" in record.cause
    causes = [attempt.cause for attempt in record.attempts]
    assert [cause[:24] for cause in causes] == [
        "rank 1 on localhost fail",
        "rank 0 on localhost fail",
    ]


@pytest.mark.slow
@pytest.mark.soak  # waits for both pauses
def test_a_run_comes_back_on_its_port_and_is_given_up_in_the_end(toy_k2: Path) -> None:
    url = launch(toy_k2, "ring")
    kill(1, "rank_pid")
    assert_told_why(url)
    wait_again(url)
    kill(0, "guard_pid")
    wait_again(url)
    kill(1, "rank_pid")
    (run,) = runs()
    assert run["state"] == "failed"
    assert "given up after 3 failures" in run["cause"] or "3 failures in a row" in run["cause"]
    assert run_processes.processes_of_run(run["run_id"]) == []


@pytest.mark.slow
def test_under_mpi_a_run_comes_back_after_its_leading_guard_and_is_stopped_in_a_pause(
    toy_k2: Path,
) -> None:
    url = launch(toy_k2, "mpi")
    kill(0, "guard_pid")
    wait_again(url)
    kill(1, "rank_pid")
    assert_told_why(url)
    assert runs()[0]["state"] == "restarting"
    assert k2("stop").returncode == 0
    (run,) = runs()
    assert run["state"] == "stopped"
    assert run_processes.processes_of_run(run["run_id"]) == []
