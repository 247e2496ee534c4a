"""Real runs of two ranks with time limits of the test's own, and a rank that is slow or hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2cli.agent import run_processes
from k2cli.choices import Parallel
from k2cli.launch.prepare import prepare_run
from k2cli.launch.request import LaunchRequest
from k2cli.protocol import Deadlines
from k2cli.runs.record import EVENTS_NAME, RunRecord, read_record
from tests.support.faults import FAULTY_RANKS
from tests.support.harness import wait_until

How = Literal["hang", "spin", "touch", "child", "stuck-child", "read"]

SHORT = Deadlines(
    step_stall=1.5,
    warmup_stall=2.5,
    peer_stall=3.5,
    work_stall=30.0,
    work_interval=0.3,
    heartbeat_interval=0.3,
)


@dataclass(frozen=True)
class Delay:
    """``rank`` does something else for ``seconds``: in the self-test, and once ``after`` exists.

    With ``loading`` it hangs before it loads, instead.
    """

    rank: int
    how: How
    seconds: float
    after: Path | None = None
    loading: bool = False


def warmed_up(record: RunRecord, rank: int) -> list[str]:
    """Return the shapes that a rank has reported, from the run's file of events."""
    events = map(json.loads, (record.folder / EVENTS_NAME).read_text().splitlines())
    return [
        f"{event['number']} of {event['count']}: {event['shape']}"
        for event in events
        if event["type"] == "LoadProgress"
        and (event["rank"], event["phase"]) == (rank, "warming up")
    ]


@contextmanager
def launched(
    model: Path,
    parallel: Parallel,
    delay: Delay | None = None,
    *,
    deadlines: Deadlines = SHORT,
    device: str = "",
    concurrency: int = 4,
) -> Iterator[RunRecord]:
    """Launch two ranks, and wait until the run is ready or has ended."""
    paths = [str(FAULTY_RANKS), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "FAULTY_RANKS_DEVICE": device}
    if delay is not None and delay.loading:
        environment["FAULTY_RANKS_LOADING"] = f"{delay.rank} {delay.seconds}"
    elif delay is not None:
        environment["FAULTY_RANKS_STEP"] = f"{delay.rank} {delay.how} {delay.seconds}"
        if delay.after is not None:
            environment["FAULTY_RANKS_STEP_AFTER"] = str(delay.after)
    request = LaunchRequest(
        str(model), ("localhost",) * 2, "ring", parallel, dtype="float32",
        context_length=512, concurrency=concurrency, deadlines=deadlines, wait_seconds=60,
    )  # fmt: skip
    folder = prepare_run(request).record.folder
    with (folder / "supervisor.out").open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "k2cli.supervisor.supervisor", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )

    def record() -> RunRecord:
        found = read_record(folder)
        assert found is not None
        return found

    try:
        wait_until(lambda: record().state in ("ready", "failed"), 600, "the start")
        yield record()
    finally:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(30)
        run_processes.kill_run(folder.name)
