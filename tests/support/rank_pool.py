"""Real rank processes without guards; the test does the guard's part."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2cli.protocol import (
    Assignment,
    Cancel,
    ControlEndpoint,
    ControlListening,
    Deadlines,
    EngineReady,
    Fatal,
    Finished,
    Generate,
    Grammar,
    RankMessage,
    RequestFailed,
    Sampling,
    Shutdown,
    Start,
    TokenLogprob,
    Tokens,
)
from k2cli.protocol.progress_page import ProgressPage
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.settings import RUN_OPTION

SECRET = "5e" * 32
_numbers = itertools.count(1)


def free_ports(count: int) -> list[int]:
    """Return free ports of the loopback address."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [entry.getsockname()[1] for entry in sockets]
    for entry in sockets:
        entry.close()
    return ports


def _process_kind() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


@dataclass
class RankProcess:
    """One rank and the test's end of its socket pair."""

    process: subprocess.Popen[bytes]
    channel: Channel[Any]
    page: ProgressPage
    seen: list[RankMessage] = field(default_factory=list)

    def receive(self, timeout_seconds: float = 60.0) -> Any:
        message = self.channel.receive(timeout_seconds)
        if message is None:
            raise TimeoutError("the rank said nothing")
        self.seen.append(message)
        if isinstance(message, Fatal):
            raise RuntimeError(f"{message.error}\n{message.traceback}")
        return message

    def wait_for(self, kind: type, timeout_seconds: float = 60.0) -> Any:
        deadline = time.monotonic() + timeout_seconds
        while True:
            message = self.receive(max(0.1, deadline - time.monotonic()))
            if isinstance(message, kind):
                return message


@dataclass
class Outcome:
    """The messages for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None
    error: str | None = None
    error_kind: str = ""


class RankPool:
    """The ranks of one run on this machine; ring for two or more."""

    def __init__(
        self,
        assignments: Sequence[Assignment],
        folder: Path,
        *,
        worker: str = "k2cli.rank.main",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.assignments = assignments
        self.worker = worker
        self.environment = dict(environment or {})
        self.folder = folder
        self.ranks: list[RankProcess] = []
        self.outcomes: dict[str, Outcome] = {}

    def start(self) -> None:
        size = len(self.assignments)
        hosts = [[f"127.0.0.1:{port}"] for port in free_ports(size)]
        hostfile = self.folder / f"hosts-{next(_numbers)}.json"
        hostfile.write_text(json.dumps(hosts))
        for assignment in self.assignments:
            self.ranks.append(self._start_rank(assignment, hostfile))
        if size > 1:
            port = self.ranks[0].wait_for(ControlListening).port
            for rank in self.ranks[1:]:
                rank.channel.send(ControlEndpoint("127.0.0.1", port))
        self.ranks[0].wait_for(EngineReady, 120.0)

    def _start_rank(self, assignment: Assignment, hostfile: Path) -> RankProcess:
        ours, theirs = socket.socketpair()
        page = ProgressPage.create()
        command = [
            sys.executable, "-m", self.worker, RUN_OPTION, assignment.run_id,
            "--rank", str(assignment.rank), "--guard-fd", str(theirs.fileno()),
            "--progress-fd", str(page.fileno()),
        ]  # fmt: skip
        environment = (
            _process_kind()
            | self.environment
            | {
                "MLX_RANK": str(assignment.rank),
                "MLX_HOSTFILE": str(hostfile),
            }
        )
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(theirs.fileno(), page.fileno()),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        channel: Channel[Any] = Channel(ours, RankMessage)
        channel.send(Start(assignment, SECRET, Deadlines(), "127.0.0.1"))
        return RankProcess(process, channel, page)

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        use_prefix_cache: bool = True,
        grammar: Grammar | None = None,
        prefix_scope: str = "",
        owner: str = "",
        use_speculation: bool = True,
    ) -> str:
        """Send a request; return its id."""
        name = f"r{next(_numbers)}"
        request = Generate(
            name,
            prompt,
            max_tokens,
            sampling or Sampling(),
            list(stop_tokens),
            use_prefix_cache,
            grammar,
            owner=owner,
            prefix_scope=prefix_scope,
            use_speculation=use_speculation,
        )
        self.ranks[0].channel.send(request)
        return name

    def cancel(self, name: str) -> None:
        """Cancel a request."""
        self.ranks[0].channel.send(Cancel(name))

    def outcome(self, name: str, timeout_seconds: float = 60.0) -> Outcome:
        """Wait for a request's end, and record the messages for others."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            outcome = self.outcomes.setdefault(name, Outcome())
            if outcome.finished is not None or outcome.error is not None:
                return outcome
            self.take(max(0.1, deadline - time.monotonic()))

    def take(self, timeout_seconds: float = 60.0) -> Any:
        """Receive and record one message of the leader rank."""
        message = self.ranks[0].receive(timeout_seconds)
        if isinstance(message, Tokens | Finished | RequestFailed):
            outcome = self.outcomes.setdefault(message.request_id, Outcome())
            match message:
                case Tokens(tokens=new, logprobs=logprobs):
                    outcome.tokens += new
                    outcome.logprobs += logprobs
                case Finished():
                    outcome.finished = message
                case RequestFailed(error=error, kind=kind):
                    outcome.error, outcome.error_kind = error, kind
        return message

    def generate(self, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
        """Run one request to its end and return its tokens."""
        outcome = self.outcome(self.submit(prompt, max_tokens, **options))
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        return outcome.tokens

    def stop(self) -> list[int]:
        """End all ranks and return their exit statuses."""
        for rank in self.ranks:
            with contextlib.suppress(ConnectionLost):
                rank.channel.send(Shutdown())
        statuses = []
        for rank in self.ranks:
            try:
                statuses.append(rank.process.wait(10))
            except subprocess.TimeoutExpired:
                rank.process.send_signal(signal.SIGKILL)
                statuses.append(rank.process.wait(10))
            rank.channel.close()
            rank.page.close()
        self.ranks.clear()
        return statuses


def assignments(
    checkpoint: Path, strategy: str, size: int, *, dtype: str = "float32", **changes: Any
) -> list[Assignment]:
    """Make the assignments of a plan for ranks on this machine, as the launcher does."""
    from benchmarks.even_split import even_split
    from k2cli.models.checkpoint import read_checkpoint
    from k2cli.sharding.placement import Placement, RankPlacement
    from k2cli.sharding.trace import layer_count, trace_model
    from tests.support.footprints import footprints

    read = read_checkpoint(checkpoint)
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in read.tensors.items()}
    count = layer_count(trace_model(read.config, stored))
    layers = changes.pop("layers", None) or (
        even_split(count, size) if strategy == "pipeline" else ((0, count),) * size
    )
    placement = Placement(
        strategy,  # type: ignore[arg-type]
        tuple(RankPlacement(rank, f"n{rank}", part) for rank, part in enumerate(layers)),
        changes.get("head", "replicated"),
    )
    fields: dict[str, Any] = {
        "run_id": f"test-{os.getpid()}",
        "size": size,
        "nodes": [f"n{rank}" for rank in range(size)],
        "transport": "ring" if size > 1 else "local",
        "model_path": str(checkpoint),
        "strategy": strategy,
        "layers": list(layers),
        "dtype": dtype,
        "context_length": 2048,
        "concurrency": 1,
        "prefill_chunk_tokens": 32,
        "expected_weights_bytes": [
            part.weights_bytes
            for part in footprints(read.config, placement, context_length=1, stored=stored,
                                   dtype=dtype)
        ],
    }  # fmt: skip
    return [Assignment(rank=rank, **(fields | changes)) for rank in range(size)]


@contextlib.contextmanager
def running(pool: RankPool) -> Iterator[RankPool]:
    """Start a pool, and stop it in any case."""
    try:
        pool.start()
        yield pool
    finally:
        pool.stop()
