"""SIGKILL at random moments, and nothing left after each: ``scripts/soak kills``.

Each round launches two real ranks and kills one to three of their processes, drawn by seed: the
launcher (or, of a detached run, its supervisor), mpirun, MPI slots, guards or ranks; while they
start, or while requests are being answered. Then no process of the run may be left within the
limit, the command must have ended by itself, its clients must have been told, ``k2 ps`` must not
call the run alive, and no secret, scratch folder or listener may remain. The next round
can launch only if no lock is in its way.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from k2cli.agent import run_processes
from k2cli.scratch import find_scratch
from k2cli.settings import runs_directory
from tests.soak.page import (
    begin,
    measured,
    note,
    paragraph,
    parser_of,
    results_of,
    say,
    table,
    workplace,
    write_failures,
    write_section,
)
from tests.support.faults import GONE_SECONDS, NO_CERTIFICATES, SECONDS, k2

TITLE = "Kills at random moments"
STRATEGIES = ("pipeline", "tensor")
BACKENDS = ("mpi", "ring")
STARTING_SECONDS = 6.0
SERVING_SECONDS = 3.0
CLIENTS = 3
NAMES = {
    "k2cli.guard.main": "guard",
    "k2cli.guard.mpi_slot_process": "MPI slot",
    "k2cli.rank.main": "rank",
}


@dataclass
class Launched:
    """A run that may not have come far: its command, and what is known of it."""

    command: subprocess.Popen[bytes]
    detached: bool
    run_id: str = ""
    url: str = ""
    clients: list[Future[str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return runs_directory() / self.run_id

    def processes(self) -> dict[str, int]:
        """Return what can be killed now, by name: ``supervisor``, ``guard 1``, ``mpirun``, ..."""
        ours = not self.detached and self.command.poll() is None
        found = {"launcher": self.command.pid} if ours else {}
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if self.detached and command[-2:] == ["k2cli.supervisor.supervisor", str(self.folder)]:
                found["supervisor"] = process.pid
        for part in run_processes.processes_of_run(self.run_id):
            program = Path(part.command.split()[0]).name
            module = re.search(r"-m (k2cli\.[\w.]+) .*--rank (\d+)", part.command)
            if program.startswith("python") and module is not None:
                found[f"{NAMES[module[1]]} {module[2]}"] = part.pid
            else:  # Open MPI's; version 5 calls its mpirun prterun
                found["mpirun"] = part.pid
        return found


def _launch(toy: Path, strategy: str, backend: str, detached: bool) -> Launched:
    before = set(runs_directory().glob("*"))
    command = subprocess.Popen(
        [sys.executable, "-m", "k2cli", "launch", str(toy), "--nodes", "localhost,localhost",
         "--backend", backend, "--parallel", strategy, "--context", "1024", "--dtype", "float32",
         *(["--detach"] if detached else [])],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    launched = Launched(command, detached)
    until = time.monotonic() + SECONDS
    while not launched.run_id:
        for folder in set(runs_directory().glob("*")) - before:
            launched.run_id = folder.name
        assert command.poll() is None, f"launch ended: {_stderr(command)}"
        assert time.monotonic() < until, "launch recorded no run"
        time.sleep(0.02)
    return launched


def _stderr(command: subprocess.Popen[bytes]) -> str:
    assert command.stderr is not None
    return command.stderr.read().decode()[-500:]


def _wait_ready(launched: Launched) -> None:
    until = time.monotonic() + SECONDS
    while True:
        (run,) = [run for run in k2("ps")["runs"] if run["run_id"] == launched.run_id]
        if run["state"] == "ready":
            launched.url = run["url"]
            return
        assert run["state"] in ("starting", "loading"), run
        assert time.monotonic() < until, "the run did not become ready"
        time.sleep(0.2)


def _ask(url: str) -> str:
    """Send requests until the run breaks; return the error that the client receives."""
    body = {"prompt": [301, 302], "max_tokens": 900, "k2": {"ignore_stop_tokens": True}}
    while True:
        try:
            answer = httpx.post(
                f"{url}/v1/completions", json=body, timeout=SECONDS, verify=NO_CERTIFICATES
            )
        except httpx.ReadTimeout:
            raise AssertionError(f"a client was told nothing for {SECONDS} s") from None
        except httpx.TransportError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return str(answer.json()["error"]["message"])


def _left(launched: Launched) -> list[str]:
    """Return what is left of a run that has ended; to be called after ``k2 ps``."""
    left = [f"process {process.pid}" for process in run_processes.processes_of_run(launched.run_id)]
    left += [str(path) for path in find_scratch(launched.run_id)]
    left += [path.name for path in launched.folder.glob("bootstrap*")]
    if (launched.folder / "launch.json").exists():
        left.append("launch.json")
    if launched.url and (port := httpx.URL(launched.url).port):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                left.append(f"a listener on port {port}")
    return left


def _over(launched: Launched, killed: list[str]) -> float:
    """Wait for the end of the run; return the seconds until none of its processes was left."""
    started = time.monotonic()
    while run_processes.processes_of_run(launched.run_id) or "supervisor" in launched.processes():
        assert time.monotonic() - started < GONE_SECONDS, f"left: {launched.processes()}"
        time.sleep(0.05)
    seconds = time.monotonic() - started
    status = launched.command.wait(GONE_SECONDS)
    # A detached launch has returned 0 if the run was ready before the kill.
    ends = {-signal.SIGKILL} if "launcher" in killed else {5}
    allowed = {0, 5} if launched.detached else ends
    assert status in allowed, f"launch exited with {status}: {_stderr(launched.command)}"
    for client in launched.clients:
        client.result(GONE_SECONDS)
    states = [run["state"] for run in k2("ps")["runs"] if run["run_id"] == launched.run_id]
    assert states in ([], ["failed"], ["lost"]), f"k2 ps says {states}"
    assert not (left := _left(launched)), f"left: {', '.join(left)}"
    return seconds


def _clear(launched: Launched) -> None:
    """End what a round has left, so that it does not affect the next round."""
    for pid in launched.processes().values():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run_processes.kill_run(launched.run_id)
    launched.command.wait(GONE_SECONDS)
    assert launched.command.stderr is not None
    launched.command.stderr.close()


def one_round(toy: Path, strategy: str, backend: str, draw: random.Random) -> dict[str, Any]:
    """Launch a run, kill processes, check, and return a row of results."""
    detached, serving = draw.random() < 0.5, draw.random() < 0.5
    wait_seconds = draw.uniform(0, SERVING_SECONDS if serving else STARTING_SECONDS)
    row: dict[str, Any] = {
        "strategy": strategy, "backend": backend, "detached": detached,
        "while": "serving" if serving else "starting", "wait_seconds": wait_seconds,
        "killed": [], "end_seconds": None, "error": "",
    }  # fmt: skip
    with ThreadPoolExecutor(CLIENTS) as pool:
        launched = _launch(toy, strategy, backend, detached)
        try:
            if serving:
                _wait_ready(launched)
                launched.clients = [pool.submit(_ask, launched.url) for _ in range(CLIENTS)]
            time.sleep(wait_seconds)
            alive = launched.processes()
            row["killed"] = sorted(draw.sample(sorted(alive), min(len(alive), draw.randint(1, 3))))
            for name in row["killed"]:
                with contextlib.suppress(ProcessLookupError):  # it ended with the previous one
                    os.kill(alive[name], signal.SIGKILL)
            row["end_seconds"] = _over(launched, row["killed"])
        except (AssertionError, OSError, subprocess.TimeoutExpired, TimeoutError) as failure:
            row["error"] = f"{type(failure).__name__}: {failure}"[:500]
        finally:
            _clear(launched)
    return row


# --- the page -------------------------------------------------------------------------------------


def page(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the section."""
    failures = sum(bool(row["error"]) for row in results)
    ends = [row["end_seconds"] for row in results if row["end_seconds"] is not None]
    lines = [
        *paragraph(
            "Each round launches two ranks, half of the time detached, and sends SIGKILL to "
            "one to three of the run's processes at once, drawn by seed: within "
            f"{STARTING_SECONDS:.0f} s of the start, or while {CLIENTS} clients are being "
            f"answered. A round is as expected if within {GONE_SECONDS} s no process of the "
            "run is left, the command ended by itself with the right status, every client was "
            "told, `k2 ps` does not call the run alive, and no secret, scratch folder or "
            "listener remains. Seconds until the last process was gone: the median and the "
            "longest."
        ),
        "",
        *paragraph(
            f"{measured(results, 'scripts/soak kills')} {len(results)} rounds in all, {failures} "
            "not as expected" + (f"; gone after {_median_and_longest(ends)} s." if ends else ".")
        ),
        "",
        *table("killed, alone or with others | while | rounds | as expected | seconds",
               _rows(results)),
        "",
        *table("placement | transport | rounds | as expected | seconds", _placements(results)),
    ]  # fmt: skip
    return lines + write_failures(results, ("strategy", "backend", "while", "killed"))


def _median_and_longest(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else ""


def _summary(rows: list[dict[str, Any]]) -> tuple[object, ...]:
    ends = [row["end_seconds"] for row in rows if row["end_seconds"] is not None]
    return len(rows), sum(not row["error"] for row in rows), _median_and_longest(ends)


def _rows(results: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    names = sorted({name for row in results for name in row["killed"]})
    for name, moment in itertools.product(names, ("starting", "serving")):
        rows = [row for row in results if name in row["killed"] and row["while"] == moment]
        if rows:
            yield name, moment, *_summary(rows)


def _placements(results: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    for strategy, backend in itertools.product(STRATEGIES, BACKENDS):
        rows = [row for row in results if (row["strategy"], row["backend"]) == (strategy, backend)]
        if rows:
            yield strategy, backend, *_summary(rows)


def main() -> int:
    """Run what is asked for and write the section; 1 if anything was not as expected."""
    parser = parser_of("kills", __doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="draws moments and victims")
    options = parser.parse_args()
    begin(options)
    combinations = itertools.cycle(itertools.product(STRATEGIES, BACKENDS))
    with workplace() as (_, toy):
        for number, (strategy, backend) in zip(range(options.rounds), combinations, strict=False):
            row = one_round(toy, strategy, backend, random.Random(f"{options.seed}-{number}"))
            note(options, row | {"seed": options.seed, "round": number})
            what = json.dumps(row["killed"])
            say(f"round {number + 1}, {strategy}, {backend}, {row['while']}: {what}: "
                f"{row['error'] or 'as expected'}")  # fmt: skip
    results = results_of(options)
    write_section(options.docs, TITLE, page(results))
    return 1 if any(result["error"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
