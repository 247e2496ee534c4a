"""The mark of a run on command lines: today's, and that of the version before it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from k2cli.agent.activity import RunActivity, activity
from k2cli.agent.clean import clean_machine
from k2cli.agent.openmpi import OpenMpi
from k2cli.agent.run_processes import kill_run, processes_of_run, run_of
from k2cli.guard.spawn import rank_arguments
from k2cli.launch.guard_commands import guard_arguments, mpi_command
from k2cli.nodes.local import LocalNode
from k2cli.runs.record import list_runs, save_record
from k2cli.runs.stop import stop_run
from tests.runs.test_record import make_record
from tests.support.harness import prepare_scripted, wait_until

SECONDS = 10.0
SLEEP = "import time; time.sleep(60)\n"
RUN = "demo-1234"
MODULES = ("k2cli/runtime/guard", "k2cli/runtime/worker", "k2cli/runtime/seat", "other_rank")


def old_commands(run_id: str, bin_folder: Path) -> list[list[str]]:
    """Command lines of a run as k2 built them at commit adf0ecc, which knew no ``--k2-run``."""
    python = [sys.executable, "-P"]
    rank = ["--run", run_id, "--rank", "1", "--guard-fd", "7", "--progress-fd", "8"]
    seat = [*python, "-m", "k2cli.runtime.seat", "--run", run_id, "--rank"]
    setting = ["k2cli.runtime", run_id]
    return [
        [
            *(*python, "-m", "k2cli.runtime.guard", "--run", run_id),
            *("--bootstrap", "bootstrap-{rank}.json", "--rank", "0"),
        ],
        [*python, "-m", "k2cli.runtime.worker", *rank],
        [*python, "-X", "k2cli.runtime", "-m", "other_rank", *rank],
        [*seat, "1"],
        [
            *(sys.executable, str(bin_folder / "mpirun"), "--map-by", ":OVERSUBSCRIBE"),
            *("--prtemca", *setting, "-np", "1", *seat, "0", ":", "-np", "1", *seat, "1"),
        ],
        [sys.executable, str(bin_folder / "orted"), "-mca", "ess", "env", "-mca", *setting],
    ]


@contextmanager
def running(commands: list[list[str]], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start programs that only sleep, under such command lines; end them at exit."""
    for name in (*(f"{module}.py" for module in MODULES), "mpirun", "orted"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SLEEP)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with ExitStack() as stack:
        started = []
        for command in commands:
            process = stack.enter_context(subprocess.Popen(command, env=environment))
            stack.callback(process.kill)
            started.append(process)
        yield started


def _kill(run_id: str) -> None:
    assert kill_run(run_id) == []


def _stop(run_id: str) -> None:
    (orphaned,) = list_runs()
    assert (orphaned.run_id, orphaned.state) == (run_id, "orphaned")
    report = stop_run(orphaned)
    assert (report.state, report.killed) == ("stopped", 6)


def _clean(run_id: str) -> None:
    (cleared,) = clean_machine(live=frozenset()).cleared
    assert (cleared.run_id, cleared.ended_processes, cleared.remaining) == (run_id, 6, ())


@pytest.mark.parametrize("end", [_kill, _stop, _clean])
def test_a_run_of_the_version_before_the_mark_is_seen_and_ended(
    end: Callable[[str], None], tmp_path: Path
) -> None:
    record = replace(make_record(), pid=2**22 + 1)
    save_record(record)
    run_id = record.run_id
    with running(old_commands(run_id, tmp_path), tmp_path) as started:
        pids = {process.pid for process in started}
        wait_until(
            lambda: {found.pid for found in processes_of_run(run_id)} == pids, SECONDS, "all six"
        )
        (here,) = [run for run in activity().runs if run.run_id == run_id]
        assert isinstance(here, RunActivity)
        assert here.processes == 6
        end(run_id)
        assert [process.wait(SECONDS) for process in started] == [-9] * 6
        assert processes_of_run(run_id) == []


@pytest.mark.parametrize(
    "mention",
    [f"pgrep -f '--k2-run {RUN}'", f"k2cli.runtime --run {RUN}", f"vim mpi k2cli_run_id {RUN}"],
)
def test_a_process_that_mentions_the_mark_in_one_argument_is_left_alone(mention: str) -> None:
    script = f"print(flush=True); {SLEEP} # {mention}"
    command = [sys.executable, "-c", script, mention, RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert processes_of_run(RUN) == []
            assert kill_run(RUN) == []
            assert RUN not in {run.run_id for run in activity().runs}
            assert process.poll() is None
        finally:
            process.kill()


def test_what_k2_starts_carries_the_mark_whatever_its_modules_are_called() -> None:
    specification = prepare_scripted("ring", 1)
    assignment = msgspec.structs.replace(specification.bootstraps[0].assignment, run_id=RUN)
    for worker in ("k2cli.runtime.worker", "other_rank"):
        assert run_of(_renamed(guard_arguments(RUN, 0, worker))) == RUN
        assert run_of(_renamed(rank_arguments(assignment, worker, 7, 8))) == RUN
    for major in (4, 5):
        mpirun = OpenMpi(Path("/m/mpirun"), major)
        command = _renamed(mpi_command(RUN, [LocalNode()], mpirun, Path("/tmp/x")).arguments)
        slot = command.index("-P")
        assert run_of(command[:slot]) == run_of(command[slot:]) == RUN


def _renamed(command: list[str] | tuple[str, ...]) -> list[str]:
    return [part.replace("k2cli.runtime", "k2cli.moved") for part in command]


def test_a_supervisor_is_no_process_of_its_run() -> None:
    command = [sys.executable, "-P", "-m", "k2cli.cluster.supervisor", f"/x/runs/{RUN}"]
    assert run_of(command) is None
