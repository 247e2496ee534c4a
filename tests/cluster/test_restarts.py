"""``--restart on-failure``: the run comes back on the port that it had, or is given up for good."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from k2cli.cluster import agent
from k2cli.cluster.restarting import Attempts, RestartPolicy
from tests.cluster.harness import wait_until
from tests.cluster.test_commands import k2, runs

pytestmark = pytest.mark.ranks


def test_failures_add_up_unless_a_run_has_served_for_long() -> None:
    attempts = Attempts(RestartPolicy("on-failure"))
    assert [attempts.failed(cause, 1.0) for cause in "abc"] == [2.0, 10.0, None]
    assert attempts.first_cause == "a"
    attempts = Attempts(RestartPolicy("on-failure"))
    assert [attempts.failed("x", 601.0) for _ in range(5)] == [2.0] * 5
    assert Attempts(RestartPolicy()).failed("x", 1e6) is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_a_run_comes_back_on_its_port_and_is_given_up_in_the_end(
    backend: str, toy_k2: Path
) -> None:
    options = ("--nodes", "localhost,localhost", "--backend", backend, "--context", "256")
    done = k2("launch", str(toy_k2), *options, "--restart", "on-failure", "--detach", "--json")
    assert done.returncode == 0, done.stderr
    url = json.loads(done.stdout)["url"]
    for failures, who in enumerate(("rank_pid", "guard_pid"), start=1):
        (run,) = runs()
        os.kill(run["ranks"][1 if who == "rank_pid" else 0][who], signal.SIGKILL)
        wait_until(lambda count=failures: len(runs()[0]["attempts"]) == count, 30, "the pause")
        if failures == 1:
            answer = httpx.get(f"{url}/health")
            assert answer.status_code == 503
            assert "rank 1 on localhost failed" in answer.json()["cause"]
        wait_until(lambda: runs()[0]["state"] == "ready", 60, "the next attempt")
        assert runs()[0]["url"] == url
        assert httpx.get(f"{url}/health").status_code == 200
    (run,) = runs()
    os.kill(run["ranks"][1]["rank_pid"], signal.SIGKILL)
    wait_until(lambda: runs()[0]["state"] == "failed", 30, "the end")
    assert (
        "given up after 3 failures" in runs()[0]["cause"]
        or "3 failures in a row" in (runs()[0]["cause"])
    )
    assert agent.processes_of_run(run["run_id"]) == []
