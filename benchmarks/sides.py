"""The two programs behind one face: start, be asked, hold still, end.

``K2Server`` and ``MlxServer`` are HTTP servers of one or two ranks; ``K2Engine`` and ``MlxLibrary``
are one process each without HTTP: k2's rank behind its socket pair, and mlx-lm's own
``generate_step`` and ``BatchGenerator``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from benchmarks import processes
from benchmarks.client import ANSWER_LIMIT_SECONDS, Ask, ask_all
from benchmarks.statistics import Answer
from k2cli.models.tokenizer import Tokenizer
from k2cli.runtime.protocol import PromptProgress, RankReady, Tokens
from tests.runtime.rank_pool import RankPool, assignments, free_ports

Strategy = Literal["single", "pipeline", "tensor"]
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Setting:
    """What both programs are to serve, and how. ``folder`` is for logs and state."""

    model: Path
    strategy: Strategy
    folder: Path
    context_length: int = 4096
    concurrency: int = 8
    niceness: int = 0
    cores_per_node: int = 1

    def tie(self, pid: int, rank: int) -> None:
        """Tie a process to the core of its rank, with the priority that all measured ones get."""
        processes.pin(pid, rank, self.cores_per_node)
        processes.prefer(pid, self.niceness)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return 1 if self.strategy == "single" else 2


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What loading cost one rank: bytes read of the checkpoint, and memory at most."""

    bytes_read: int
    peak_resident_bytes: int


class Side(Protocol):
    """One program, serving one model."""

    name: str

    def start(self) -> float:
        """Start it and return the seconds until it had answered a first request."""
        ...

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send requests at the same moment and wait for all."""
        ...

    def hold(self) -> None:
        """Keep it from using a core while the other is measured."""
        ...

    def let_go(self) -> None:
        """Undo ``hold``."""
        ...

    def close(self) -> None:
        """End it and all it started."""
        ...


def _first_answer(side: Side) -> None:
    side.ask([Ask(" bab bac", 1)])


def _environment(setting: Setting) -> dict[str, str]:
    state = setting.folder / "state"
    return {"K2_STATE_DIR": str(state), "PYTHONPATH": str(_ROOT), "NO_COLOR": "1"}


@dataclass
class K2Server:
    """``k2 launch --detach``: guards, ranks and the HTTP API, as a user starts them."""

    setting: Setting
    name: str = "k2"
    _port: int = 0
    _record: dict[str, Any] = field(default_factory=dict)

    def start(self) -> float:
        """Launch, ask once, tie each guard and rank to a core."""
        (self._port,) = free_ports(1)
        setting = self.setting
        nodes = ",".join(["localhost"] * setting.ranks)
        options = {
            "--nodes": nodes,
            "--backend": "ring" if setting.ranks > 1 else "local",
            "--parallel": setting.strategy,
            "--context": str(setting.context_length),
            "--concurrency": str(setting.concurrency),
            "--port": str(self._port),
        }
        started = time.perf_counter()
        words = [word for option in options.items() for word in option]
        output = self._k2("launch", str(setting.model), *words, "--detach", "--json")
        self._record = json.loads(output)
        _first_answer(self)
        seconds = time.perf_counter() - started
        for rank in self._ranks():
            self.setting.tie(rank["guard_pid"], rank["rank"])
            self.setting.tie(rank["rank_pid"], rank["rank"])
        return seconds

    def _k2(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "k2cli", *arguments],
            env=processes.environment(_environment(self.setting)),
            capture_output=True,
            text=True,
            timeout=processes.START_LIMIT_SECONDS,
        )
        if done.returncode != 0:
            raise RuntimeError(f"k2 {arguments[0]} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def _ranks(self) -> list[dict[str, Any]]:
        record: dict[str, Any] = self._record.get("run", self._record)
        ranks: list[dict[str, Any]] = record["ranks"]
        return ranks

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Over HTTP."""
        extra = {"k2": {"ignore_stop_tokens": True}}
        return ask_all(self._port, asks, model=self.setting.model.name, extra=extra)

    def hold(self) -> None:
        """Not needed: idle ranks wait in the kernel. (And a run held still would end itself.)"""

    def let_go(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        """Stop the run."""
        self._k2("stop", "--all")


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
        _first_answer(self)
        seconds = time.perf_counter() - started
        for rank, process in enumerate(self._processes):
            self.setting.tie(process.pid, rank)
        return seconds

    def _listens(self) -> bool:
        return processes.accepts(self._port)

    def facts(self) -> list[RankFacts]:
        """By the system's counts, less those of the program that has loaded nothing."""
        bare = processes.bare_program("mlx_lm.server")
        return [
            RankFacts(
                processes.bytes_read(process.pid) - bare.bytes_read,
                processes.peak_resident_bytes(process.pid) - bare.peak_resident_bytes,
            )
            for process in self._processes
        ]

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Over HTTP."""
        return ask_all(self._port, asks, model="default_model", extra={})

    def hold(self) -> None:
        """Idle ranks spin in a collective, ten times a second and in between."""
        processes.hold(process.pid for process in self._processes)

    def let_go(self) -> None:
        """Go on."""
        processes.let_go(process.pid for process in self._processes)

    def close(self) -> None:
        """By pid; it ends on no other signal in time."""
        self.let_go()
        processes.end(process.pid for process in self._processes)
        for process in self._processes:
            process.wait(10)
        self._processes.clear()


@dataclass
class K2Engine:
    """Rank processes of k2 without guards and HTTP, spoken to as their guard does."""

    setting: Setting
    name: str = "k2 engine"
    _pool: RankPool | None = None
    _tokenizer: Tokenizer | None = None

    def start(self) -> float:
        """Start the ranks, ask once, tie each to a core."""
        setting = self.setting
        parts = assignments(
            setting.model,
            setting.strategy,
            setting.ranks,
            context_length=setting.context_length,
            concurrency=setting.concurrency,
            prefill_chunk_tokens=2048,
            nodes=["localhost"] * setting.ranks,
        )
        self._tokenizer = Tokenizer.load(setting.model)
        self._pool = RankPool(parts, setting.folder)
        started = time.perf_counter()
        self._pool.start()
        _first_answer(self)
        seconds = time.perf_counter() - started
        for number, rank in enumerate(self._pool.ranks):
            self.setting.tie(rank.process.pid, number)
        return seconds

    def facts(self) -> list[RankFacts]:
        """Bytes read by the rank's own count, memory as for the other program."""
        assert self._pool is not None
        bare = processes.bare_program("k2cli.runtime.engine", "k2cli.runtime.loader")
        found = []
        for rank in self._pool.ranks:
            ready = [message for message in rank.seen if isinstance(message, RankReady)]
            message = ready[0] if ready else rank.wait_for(RankReady)
            peak = processes.peak_resident_bytes(rank.process.pid)
            found.append(RankFacts(message.bytes_read, peak - bare.peak_resident_bytes))
        return found

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Over the socket pair."""
        assert self._pool is not None
        assert self._tokenizer is not None
        pool = self._pool
        prompts = [_encode(self._tokenizer, ask) for ask in asks]
        started = time.perf_counter()
        names = [pool.submit(p, ask.max_tokens) for p, ask in zip(prompts, asks, strict=True)]
        marks: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
        while any(name not in pool.outcomes or not _over(pool, name) for name in names):
            message = pool.take(ANSWER_LIMIT_SECONDS)
            if isinstance(message, PromptProgress | Tokens) and message.request_id in marks:
                count = (
                    len(pool.outcomes[message.request_id].tokens)
                    if isinstance(message, Tokens)
                    else 0
                )
                if count:
                    marks[message.request_id].append((time.perf_counter() - started, count))
        return [
            _answer(prompt, pool.outcomes.pop(name).tokens, marks[name])
            for prompt, name in zip(prompts, names, strict=True)
        ]

    def hold(self) -> None:
        """Not needed: idle ranks wait in the kernel."""

    def let_go(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        """Shut the ranks down."""
        if self._pool is not None:
            self._pool.stop()


def _over(pool: RankPool, name: str) -> bool:
    outcome = pool.outcomes[name]
    if outcome.error is not None:
        raise RuntimeError(f"k2's engine: {outcome.error}")
    return outcome.finished is not None


def _encode(tokenizer: Tokenizer, ask: Ask) -> list[int]:
    if isinstance(ask.prompt, str):
        return tokenizer.encode(ask.prompt)
    return tokenizer.chat_tokens([dict(message) for message in ask.prompt])


def _answer(prompt: list[int], tokens: list[int], marks: list[tuple[float, int]]) -> Answer:
    content = " ".join(map(str, tokens))
    return Answer(len(prompt), len(tokens), tuple(marks), content)


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
        _first_answer(self)
        seconds = time.perf_counter() - started
        self.setting.tie(self._process.pid, 0)
        return seconds

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """One line out, one line back."""
        assert self._process is not None
        assert self._tokenizer is not None
        prompts = [_encode(self._tokenizer, ask) for ask in asks]
        question = {"prompts": prompts, "max_tokens": asks[0].max_tokens}
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None
        assert sink is not None
        sink.write(json.dumps(question).encode() + b"\n")
        sink.flush()
        line = _line_in_time(source)
        return [
            _answer(prompt, tokens, [(at, n) for n, at in enumerate(times, start=1)])
            for prompt, (tokens, times) in zip(prompts, json.loads(line), strict=True)
        ]

    def hold(self) -> None:
        """Not needed: it waits for a line."""

    def let_go(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        """By pid."""
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
