"""Kill or stop each process of a run: no process remains, and ``ps`` shows the right state."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.agent import facts as node_facts
from k2cli.choices import Transport
from k2cli.protocol import Deadlines
from k2cli.scratch import find_scratch
from tests.support.harness import supervised

pytestmark = pytest.mark.ranks

# A killed process is noticed at once, a stopped one only after these deadlines.
SHORT = Deadlines(liveness=3.0, stopped=2.0, step_stall=4.0)
TARGETS = ("launcher", "guard-0", "guard-1", "rank-0", "rank-1")


def _table() -> list[tuple[Transport, str, signal.Signals]]:
    rows: list[tuple[Transport, str, signal.Signals]] = []
    for transport in ("mpi", "ring"):
        rows += [(transport, who, signal.SIGKILL) for who in TARGETS]
    rows.append(("mpi", "mpirun", signal.SIGKILL))
    rows += [("mpi", who, signal.SIGSTOP) for who in ("rank-0", "rank-1", "guard-0")]
    rows.append(("ring", "guard-1", signal.SIGSTOP))
    return rows


@pytest.mark.parametrize(("transport", "who", "number"), _table())
def test_nothing_survives(transport: Transport, who: str, number: signal.Signals) -> None:
    with supervised(transport, deadlines=SHORT) as run:
        run.wait_ready()
        os.kill(run.pid_of(who), number)
        run.wait_gone()
        if who == "launcher":
            run.supervisor.wait(5)
        else:
            assert run.supervisor.wait(20) == 5
        record = run.record
    assert record.state == ("lost" if who == "launcher" else "failed")
    assert record.ended is not None
    if "-" in who:
        assert record.failure is not None
        assert record.failure.rank == int(who[-1])
        assert record.cause.startswith(f"rank {who[-1]} on localhost failed: ")
    if who.startswith("rank"):
        assert record.failure is not None
        assert record.failure.exit_status == -signal.SIGKILL
        assert record.failure.last_lines[0] == f"rank {who[-1]} of 2 says hello"
    assert not find_scratch(run.run_id)
    assert not list(record.folder.glob("bootstrap*"))
    assert not (record.folder / "launch.json").exists()


def test_a_stopped_mpirun_does_not_block_the_end_of_a_run() -> None:
    """Such an mpirun has started its processes already, and is killed at the end of the run."""
    with supervised("mpi", deadlines=SHORT) as run:
        run.wait_ready()
        os.kill(run.pid_of("mpirun"), signal.SIGSTOP)
        run.supervisor.terminate()
        assert run.supervisor.wait(20) == 0
        assert not run.processes()
    assert run.record.state == "stopped"


@pytest.mark.parametrize("transport", ["local", "mpi", "ring"])
def test_sigterm_to_the_launcher_stops_in_good_order(transport: Transport) -> None:
    with supervised(transport, size=1 if transport == "local" else 2) as run:
        ready = run.wait_ready()
        assert [rank.weights_bytes for rank in ready.ranks] == [1000, 1001][: len(ready.ranks)]
        run.supervisor.terminate()
        assert run.supervisor.wait(20) == 0
        assert not run.processes()
    assert run.record.state == "stopped"
    assert (run.record.folder / "supervisor.out").read_text() == ""


@pytest.mark.parametrize(
    ("how", "cause", "status"),
    [
        ("exit", "it exited with status 3", 3),
        ("fatal", "tensor x has 3 elements, expected 4", 1),
        ("term", "it was killed by SIGSEGV", -signal.SIGSEGV),
        ("hang", "it made no progress for", -signal.SIGKILL),
    ],
)
def test_a_rank_that_fails_while_loading_is_named(how: str, cause: str, status: int) -> None:
    deadlines = Deadlines(load_stall=1.5)
    with supervised("ring", deadlines=deadlines, environment={"SCRIPT_FAIL": how}) as run:
        assert run.supervisor.wait(30) == 5
        assert not run.processes()
    record = run.record
    assert record.state == "failed"
    assert record.failure is not None
    assert (record.failure.rank, record.failure.exit_status) == (1, status)
    assert record.failure.cause.startswith(cause)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with room for 24 MiB."""
    root = Path("/sys/fs/cgroup")
    unified = (root / "cgroup.controllers").exists()
    group = (root if unified else root / "memory") / f"k2-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        limit = group / ("memory.max" if unified else "memory.limit_in_bytes")
        log = os.access("/dev/kmsg", os.R_OK)
        first = os.readlink("/proc/self/ns/pid") == "pid:[4026531836]"
        if not (limit.exists() and log and first):
            pytest.skip("no limits of memory for groups, or the kernel's log is not of this system")
        limit.write_text(str(24 * 2**20))
        yield group
    finally:
        group.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux'")
def test_a_rank_that_the_kernel_kills_for_memory_is_said_to_be(small_group: Path) -> None:
    environment = {"SCRIPT_FAIL": "memory", "SCRIPT_CGROUP": str(small_group)}
    with supervised("local", size=1, environment=environment) as run:
        assert run.supervisor.wait(30) == 5
        failure = run.record.failure
    assert failure is not None
    assert failure.exit_status == -signal.SIGKILL
    said = re.fullmatch(
        r"it was killed \(SIGKILL\), likely out of memory: the kernel killed pid (\d+) "
        r"\(\S+, .*B resident, its control group was at its limit\)",
        failure.cause,
    )
    assert said is not None, failure.cause
    assert int(said[1]) == run.record.ranks[0].rank_pid


def test_a_supervisor_that_cannot_start_mpirun_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An mpirun that ends at once, with its reason on stderr."""
    program = tmp_path / "mpirun"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo "mpirun (Open MPI) 4.1.6"; exit 0; }\n'
        "echo no slots for you >&2; exit 7\n"
    )
    program.chmod(0o755)
    library = node_facts.facts().libmpi
    assert library is not None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.40").symlink_to(library)
    (tmp_path / "bin").mkdir()
    program = program.rename(tmp_path / "bin" / "mpirun")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with supervised("mpi") as run:
        assert run.supervisor.wait(30) == 5
    failure = run.record.failure
    assert failure is not None
    assert failure.cause == "mpirun exited with status 7"
    assert failure.last_lines == ("no slots for you",)
