"""Runs with real supervisors and guards, and scripted ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from k2cli.access.keys import KeyChoice
from k2cli.agent import ports, run_folder, run_processes
from k2cli.choices import Transport
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.launch.specification import RunSpecification, save_specification
from k2cli.nodes.local import LocalNode
from k2cli.protocol import Assignment, Bootstrap, Deadlines, HttpEndpoint
from k2cli.runs.record import RankRecord, RunRecord, list_runs, new_run_id, save_record

SCRIPTED = "tests.support.scripted_rank"
GONE_SECONDS = 15.0


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


@dataclass
class SupervisedRun:
    """A run and the process that supervises it."""

    run_id: str
    supervisor: subprocess.Popen[bytes]

    @property
    def record(self) -> RunRecord:
        """The record as ``k2 ps`` shows it."""
        return next(run for run in list_runs() if run.run_id == self.run_id)

    def wait_ready(self, seconds: float = 60.0) -> RunRecord:
        wait_until(self._settled, seconds, "ready")
        record = self.record
        assert record.state == "ready", f"{record.cause}\n{record.log_file.read_text()}"
        return record

    def _settled(self) -> bool:
        record = self.record
        # A scripted leader does not wait for its followers.
        if record.state == "ready":
            return all(rank.weights_bytes for rank in record.ranks)
        return record.state in ("failed", "stopped", "lost", "orphaned")

    def processes(self) -> list[psutil.Process]:
        """Return the processes of guards, ranks and mpirun."""
        found = []
        for process in run_processes.processes_of_run(self.run_id):
            try:
                found.append(psutil.Process(process.pid))
            except psutil.NoSuchProcess:
                continue
        return found

    def wait_gone(self) -> None:
        """Wait until no process of the run is left on this machine."""
        wait_until(lambda: not self.processes(), GONE_SECONDS, f"the end of {self.run_id}")

    def pid_of(self, who: str) -> int:
        """Return the process id of ``launcher``, ``mpirun``, ``guard-0``, ``rank-1`` and so on."""
        kind, _, number = who.partition("-")
        if kind == "launcher":
            return self.supervisor.pid
        if kind == "mpirun":
            return next(p.pid for p in self.processes() if p.name() in ("mpirun", "prterun"))
        rank = self.record.ranks[int(number)]
        pid = rank.guard_pid if kind == "guard" else rank.rank_pid
        assert pid is not None
        return pid


def _specification(
    transport: Transport,
    size: int,
    deadlines: Deadlines,
    worker: str,
    restart: RestartPolicy,
    model: Path | None,
    context_length: int,
    named_keys: KeyChoice,
    http: dict[str, Any],
) -> RunSpecification:
    run_id = new_run_id("scripted")
    environment = {}
    if transport == "mpi":
        environment["MLX_MPI_LIBNAME"] = str(LocalNode().facts().libmpi)
    port, http_port = ports.free_ports(2)
    bootstraps = [
        Bootstrap(
            assignment=Assignment(
                run_id=run_id,
                rank=rank,
                size=size,
                nodes=["localhost"] * size,
                transport=transport,
                model_path=str(model or "/nowhere"),
                strategy="pipeline",
                layers=[],
                dtype="float32",
                context_length=context_length,
                concurrency=1,
                prefill_chunk_tokens=128,
                expected_weights_bytes=[],
                ring_hosts=[["127.0.0.1:1"]] * size if transport == "ring" else None,
            ),
            secret="5e" * 32,
            liveness_host="127.0.0.1",
            liveness_port=port,
            model_name="scripted",
            environment=environment,
            deadlines=deadlines,
            http=HttpEndpoint(**({"host": "127.0.0.1", "port": http_port} | http))
            if model is not None and rank == 0
            else None,
        )
        for rank in range(size)
    ]
    return RunSpecification(bootstraps, worker, restart=restart, named_keys=named_keys)


def prepare_scripted(
    transport: Transport,
    size: int = 2,
    deadlines: Deadlines | None = None,
    restart: RestartPolicy | None = None,
    model: Path | None = None,
    context_length: int = 128,
    named_keys: KeyChoice = "none",
    http: dict[str, Any] | None = None,
) -> RunSpecification:
    """Write the folder of a run whose ranks are scripted; with a model, it serves the API."""
    policy = restart or RestartPolicy()
    specification = _specification(
        transport,
        size,
        deadlines or Deadlines(),
        SCRIPTED,
        policy,
        model,
        context_length,
        named_keys,
        http or {},
    )
    own = psutil.Process()
    record = RunRecord(
        run_id=specification.run_id,
        model="scripted",
        model_name="scripted",
        state="starting",
        backend=transport,
        strategy="pipeline",
        context_length=context_length,
        ranks=tuple(RankRecord(rank, "localhost") for rank in range(size)),
        created=time.time(),
        pid=own.pid,
        pid_create_time=own.create_time(),
    )
    save_specification(specification)
    save_record(record)
    return specification


@contextmanager
def supervised(
    transport: Transport,
    size: int = 2,
    deadlines: Deadlines | None = None,
    environment: dict[str, str] | None = None,
    restart: RestartPolicy | None = None,
    model: Path | None = None,
    context_length: int = 128,
    named_keys: KeyChoice = "none",
    http: dict[str, Any] | None = None,
) -> Iterator[SupervisedRun]:
    """Start a scripted run under a supervisor; kill its remaining processes at exit."""
    specification = prepare_scripted(
        transport, size, deadlines, restart, model, context_length, named_keys, http
    )
    folder = run_folder.run_folder(specification.run_id)
    with (folder / "supervisor.out").open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "k2cli.supervisor.supervisor", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
    run = SupervisedRun(specification.run_id, supervisor)
    wait_until(
        lambda: run.record.pid == supervisor.pid or supervisor.poll() is not None, 30, "take-over"
    )
    try:
        yield run
    finally:
        if supervisor.poll() is None:
            supervisor.send_signal(signal.SIGTERM)
            try:
                supervisor.wait(20)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.wait(5)
        run_processes.kill_run(run.run_id)
