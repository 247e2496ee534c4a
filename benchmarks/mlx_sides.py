"""mlx-lm as a side of the comparison: its HTTP server, and its functions in a process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks import processes
from benchmarks.client import ANSWER_LIMIT_SECONDS, Ask, ask_all
from benchmarks.sides import RankFacts, Setting, answer_of, encode, first_answer
from benchmarks.statistics import Answer
from k2cli.models.text.tokenizer import Tokenizer
from tests.support.rank_pool import free_ports

_ROOT = Path(__file__).resolve().parents[1]


@dataclass
class MlxServer:
    """``mlx_lm.server`` on one rank or two, with the environment that ``mlx.launch`` gives it.

    Without ``mlx.launch`` itself, whose loop takes half a core: the fewer of them, the better
    mlx-lm looks.
    """

    setting: Setting
    name: str = "mlx-lm"
    _port: int = 0
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> float:
        """Start the ranks, ask once, tie each to a core."""
        setting = self.setting
        self._port, *ring = free_ports(1 + setting.ranks)
        hostfile = setting.folder / "ring.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ring]))
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(setting.model)]
        command += ["--port", str(self._port)]
        command += ["--pipeline"] if setting.strategy == "pipeline" else []
        started = time.perf_counter()
        for rank in range(setting.ranks):
            environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
            self._processes.append(
                processes.start(
                    command,
                    setting.folder / f"mlx-{rank}.log",
                    environment if setting.ranks > 1 else None,
                    # As k2's guards: else it would start with the priority of this process.
                    start_new_session=True,
                )
            )
        processes.wait_until(self._listens, "mlx_lm.server", self._processes)
        first_answer(self)
        seconds = time.perf_counter() - started
        for rank, process in enumerate(self._processes):
            self.setting.tie(process.pid, rank)
        return seconds

    def _listens(self) -> bool:
        return processes.accepts(self._port)

    def facts(self) -> list[RankFacts]:
        """Return the system's counts, less those of the bare program."""
        bare = processes.bare_program("mlx_lm.server")
        return [
            RankFacts(
                processes.bytes_read(process.pid) - bare.bytes_read,
                processes.peak_resident_bytes(process.pid) - bare.peak_resident_bytes,
            )
            for process in self._processes
        ]

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send the requests over HTTP."""
        return ask_all(self._port, asks, model="default_model", extra={})

    def hold(self) -> None:
        """Stop the ranks, which spin in a collective while they are idle."""
        processes.hold(process.pid for process in self._processes)

    def let_go(self) -> None:
        """Continue the ranks."""
        processes.let_go(process.pid for process in self._processes)

    def close(self) -> None:
        """Kill the ranks by pid, since the server does not end in time on other signals."""
        self.let_go()
        processes.end(process.pid for process in self._processes)
        for process in self._processes:
            process.wait(10)
        self._processes.clear()


@dataclass
class MlxLibrary:
    """mlx-lm's generation functions in a process of their own: ``benchmarks.mlx_process``."""

    setting: Setting
    name: str = "mlx-lm library"
    _process: subprocess.Popen[bytes] | None = None
    _tokenizer: Tokenizer | None = None

    def start(self) -> float:
        """Start the process, ask once, tie it to a core."""
        self._tokenizer = Tokenizer.load(self.setting.model)
        started = time.perf_counter()
        self._process = processes.start(
            [sys.executable, "-m", "benchmarks.mlx_process", str(self.setting.model)],
            self.setting.folder / "mlx-library.log",
            {"PYTHONPATH": str(_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        first_answer(self)
        seconds = time.perf_counter() - started
        self.setting.tie(self._process.pid, 0)
        return seconds

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send the requests as one line and read the answers as one line."""
        assert self._process is not None
        assert self._tokenizer is not None
        prompts = [encode(self._tokenizer, ask) for ask in asks]
        question = {"prompts": prompts, "max_tokens": asks[0].max_tokens}
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None
        assert sink is not None
        sink.write(json.dumps(question).encode() + b"\n")
        sink.flush()
        line = _line_in_time(source)
        return [
            answer_of(prompt, tokens, [(at, n) for n, at in enumerate(times, start=1)])
            for prompt, (tokens, times) in zip(prompts, json.loads(line), strict=True)
        ]

    def hold(self) -> None:
        """Do nothing: the process waits for a line."""

    def let_go(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        """Kill the process by pid."""
        if self._process is not None:
            processes.end([self._process.pid])
            self._process.wait(10)
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()


def _line_in_time(source: IO[bytes]) -> bytes:
    import select

    readable, _, _ = select.select([source], [], [], ANSWER_LIMIT_SECONDS)
    if not readable:
        raise RuntimeError(f"mlx-lm gave no answer in {ANSWER_LIMIT_SECONDS:.0f} s")
    line = source.readline()
    if not line:
        raise RuntimeError("mlx-lm's process ended")
    return line
