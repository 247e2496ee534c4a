"""k2 and mlx_lm.server as they are measured on GPUs: started, asked over HTTP, ended.

A program is named ``k2:STRATEGY:TRANSPORT`` or ``mlx:STRATEGY``, such as ``k2:tensor:nccl`` and
``mlx:pipeline``; STRATEGY is ``single``, ``pipeline`` or ``tensor``. mlx_lm.server uses the ring,
since it fails over NCCL.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks import processes
from benchmarks.checkpoints import word_prompt
from benchmarks.client import Ask, ask_all
from benchmarks.full_width import gpus
from benchmarks.statistics import Answer
from tests.support.rank_pool import free_ports

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 560.0
_SHORT_PROMPT = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """Folders and limits for all programs. ``model`` is for k2, ``peer_model`` for mlx-lm.

    ``folder`` holds logs, k2's state and compiled kernels.
    """

    model: Path
    peer_model: Path
    folder: Path
    context_length: int = 20_480
    concurrency: int = 8


class Program(Protocol):
    """One program that serves one model."""

    name: str

    def start(self) -> float:
        """Start it; return the seconds until it had answered one token."""
        ...

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send requests at the same moment and wait for all answers."""
        ...

    def pids(self) -> dict[str, int]:
        """Return the process of each rank, by ``rank N``."""
        ...

    def hold(self) -> None:
        """Keep it from using a core while another program is measured."""
        ...

    def let_go(self) -> None:
        """Undo ``hold``."""
        ...

    def close(self) -> None:
        """End it and all that it started, also if it has ended; report nothing."""
        ...


def make_program(name: str, settings: Settings) -> Program:
    """Return a program by its name.

    Raises:
        ValueError: if there is no such program.
    """
    kind, strategy, *transport = name.split(":")
    if kind not in ("k2", "mlx") or strategy not in ("single", "pipeline", "tensor"):
        raise ValueError(f"'{name}' is not k2:STRATEGY:TRANSPORT or mlx:STRATEGY")
    if kind == "mlx":
        return MlxProgram(name, settings, strategy)
    return K2Program(name, settings, strategy, (transport or ["auto"])[0])


def _ranks(strategy: str) -> int:
    return 1 if strategy == "single" else 2


def first_answer(program: Program) -> None:
    """Ask for one token: a program is up once it answers."""
    program.ask([Ask(word_prompt(_SHORT_PROMPT, 1), 1)])


@dataclass
class K2Program:
    """``k2 launch --detach``."""

    name: str
    settings: Settings
    strategy: str
    transport: str
    record: dict[str, Any] = field(default_factory=dict)
    ready_seconds: float = 0.0
    _port: int = 0

    @property
    def _state(self) -> Path:
        return self.settings.folder / "state"

    def start(self) -> float:
        (self._port,) = free_ports(1)
        options = {
            "--nodes": ",".join(["localhost"] * _ranks(self.strategy)),
            "--backend": self.transport if _ranks(self.strategy) > 1 else "local",
            "--parallel": self.strategy,
            "--context": str(self.settings.context_length),
            "--concurrency": str(self.settings.concurrency),
            "--port": str(self._port),
        }
        words = [word for option in options.items() for word in option]
        began = time.perf_counter()
        # The other program holds memory of the same GPUs; the plan counts only this run's.
        output = self._k2(
            "launch", str(self.settings.model), *words, "--detach", "--json", "--share"
        )
        self.ready_seconds = time.perf_counter() - began
        self.record = json.loads(output)
        first_answer(self)
        return time.perf_counter() - began

    def _k2(self, *arguments: str) -> str:
        environment = {
            "K2_STATE_DIR": str(self._state),
            "K2_CACHE_DIR": str(self.settings.folder / "kernels-k2"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "NO_COLOR": "1",
        }
        # Into the file at once: a start that is ended from outside must show how far it was.
        log_file = self.settings.folder / "k2.log"
        with log_file.open("a+") as log:
            log.write(f"$ k2 {' '.join(arguments)}\n")
            log.flush()
            began = log.tell()
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "k2cli", *arguments],
                    env=processes.environment(environment),
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    timeout=START_SECONDS,
                )
                why = f"ended with {done.returncode}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                why = f"has not ended after {START_SECONDS:.0f} s"
            log.seek(began)
            said = log.read()[-2000:]
        if why:
            raise RuntimeError(f"k2 {arguments[0]} {why}: {said}")
        return done.stdout

    def plan(self) -> dict[str, Any]:
        """Return the plan of the run that was started."""
        path = self._state / "runs" / self.record["run_id"] / "plan.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        extra = {"k2": {"ignore_stop_tokens": True}}
        return ask_all(self._port, asks, model=self.settings.model.name, extra=extra)

    def pids(self) -> dict[str, int]:
        return {f"rank {rank['rank']}": rank["rank_pid"] for rank in self.record["ranks"]}

    def hold(self) -> None:
        """Do nothing: idle ranks wait in the kernel, and a stopped run would end itself."""

    def let_go(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        if self.record:
            with contextlib.suppress(RuntimeError, OSError, subprocess.SubprocessError):
                self._k2("stop", self.record["run_id"])
            self.record = {}


@dataclass
class MlxProgram:
    """``mlx_lm.server`` with the environment that ``mlx.launch`` gives it, a GPU per rank."""

    name: str
    settings: Settings
    strategy: str
    ready_seconds: float = 0.0
    _port: int = 0
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> float:
        ranks = _ranks(self.strategy)
        self._port, *ring = free_ports(1 + ranks)
        hostfile = self.settings.folder / f"ring-{self._port}.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ring]))
        command = [sys.executable, "-m", "mlx_lm", "server"]
        command += ["--model", str(self.settings.peer_model), "--port", str(self._port)]
        command += ["--pipeline"] if self.strategy == "pipeline" else []
        kernels = self.settings.folder / "kernels-mlx"
        kernels.mkdir(exist_ok=True)
        devices = gpus.count()
        began = time.perf_counter()
        for rank in range(ranks):
            environment = {"MLX_PTX_CACHE_DIR": str(kernels)}
            if ranks > 1:
                environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = str(rank % devices)
            log = self.settings.folder / f"mlx-{rank}.log"
            self._processes.append(
                processes.start(command, log, environment, start_new_session=True)
            )
        self._wait(lambda: processes.accepts(self._port))
        self.ready_seconds = time.perf_counter() - began
        first_answer(self)
        return time.perf_counter() - began

    def _wait(self, condition: Any) -> None:
        until = time.monotonic() + START_SECONDS
        while not condition():
            ended = [each for each in self._processes if each.poll() is not None]
            if ended or time.monotonic() > until:
                why = f"exited with {ended[0].returncode}" if ended else "is not up"
                raise RuntimeError(f"mlx_lm.server {why}: {self._last_lines()}")
            time.sleep(0.1)

    def _last_lines(self) -> str:
        return (self.settings.folder / "mlx-0.log").read_text(errors="replace")[-2000:]

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        return ask_all(self._port, asks, model="default_model", extra={})

    def pids(self) -> dict[str, int]:
        return {f"rank {rank}": each.pid for rank, each in enumerate(self._processes)}

    def hold(self) -> None:
        """Stop the ranks, which spin in a collective while they are idle."""
        for each in self._processes:
            each.send_signal(signal.SIGSTOP)

    def let_go(self) -> None:
        for each in self._processes:
            each.send_signal(signal.SIGCONT)

    def close(self) -> None:
        # ``Popen`` sends nothing to a process whose end was seen: its id may be another one's.
        for each in self._processes:
            each.kill()
        for each in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(30)
        self._processes.clear()
