"""Test the cleanup of prepared runs, and that a guard does not outlive its launcher."""

from __future__ import annotations

import os
import subprocess

import msgspec
import pytest

from k2cli.agent import run_folder, run_processes
from k2cli.launch.guard_commands import guard_arguments
from k2cli.nodes.node import python_environment
from k2cli.protocol import RunEvent
from k2cli.runs.record import read_record
from k2cli.scratch import find_scratch, make_scratch
from k2cli.settings import runs_directory
from k2cli.supervisor.start import cleanup_on_error, launch_detached
from tests.support.harness import SCRIPTED, prepare_scripted


def test_ctrl_c_before_the_start_leaves_a_record_and_no_secret() -> None:
    specification = prepare_scripted("mpi")
    make_scratch(specification.run_id)
    folder = runs_directory() / specification.run_id
    record = read_record(folder)
    assert record is not None
    assert (folder / "launch.json").is_file()
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), cleanup_on_error(record, said.append):
        raise KeyboardInterrupt
    assert said == [f"stopping {specification.run_id}"]
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    assert not find_scratch(specification.run_id)
    left = read_record(folder)
    assert left is not None
    assert (left.state, left.cause) == ("stopped", "interrupted")


@pytest.mark.ranks
def test_ctrl_c_before_a_detached_run_is_ready_stops_it_and_says_so() -> None:
    specification = prepare_scripted("ring")
    record = read_record(runs_directory() / specification.run_id)
    assert record is not None
    said: list[bool] = []

    def interrupt(event: RunEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch_detached(record, interrupt, said.append)
    assert said == [True]
    left = read_record(record.folder)
    assert left is not None
    assert (left.state, left.left) == ("stopped", {})
    assert not run_processes.processes_of_run(specification.run_id)


@pytest.mark.ranks
def test_a_follower_that_never_met_its_leader_ends_with_the_launcher() -> None:
    """Such a guard would wait a minute for the leader's guard."""
    specification = prepare_scripted("ring")
    bootstrap = msgspec.json.encode(specification.bootstraps[1])
    run_folder.write_private(specification.run_id, "bootstrap-1.json", bootstrap)
    guard = subprocess.Popen(
        guard_arguments(specification.run_id, 1, SCRIPTED),
        stdin=subprocess.PIPE,
        env={**os.environ, **python_environment()},
        start_new_session=True,
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            guard.wait(3)
        assert guard.stdin is not None
        guard.stdin.close()
        assert guard.wait(20) == 5
        assert not run_processes.processes_of_run(specification.run_id)
    finally:
        run_processes.kill_run(specification.run_id)
        guard.wait(5)
