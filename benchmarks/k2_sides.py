"""k2 as it is measured: a run of ``k2 launch`` over HTTP, and ranks behind their socket pairs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.client import ANSWER_LIMIT_SECONDS, Ask, ask_all
from benchmarks.sides import RankFacts, Setting, answer_of, encode, first_answer
from benchmarks.statistics import Answer
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import PromptProgress, RankReady, Tokens
from tests.support.rank_pool import RankPool, assignments, free_ports

_ROOT = Path(__file__).resolve().parents[1]


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
        first_answer(self)
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
        """Send the requests over HTTP."""
        extra = {"k2": {"ignore_stop_tokens": True}}
        return ask_all(self._port, asks, model=self.setting.model.name, extra=extra)

    def hold(self) -> None:
        """Do nothing: idle ranks wait in the kernel, and a stopped run would end itself."""

    def let_go(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        """Stop the run."""
        self._k2("stop", "--all")


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
        first_answer(self)
        seconds = time.perf_counter() - started
        for number, rank in enumerate(self._pool.ranks):
            self.setting.tie(rank.process.pid, number)
        return seconds

    def facts(self) -> list[RankFacts]:
        """Return bytes read as the ranks count them, and memory as for the other program."""
        assert self._pool is not None
        bare = processes.bare_program("k2cli.rank.engine.engine", "k2cli.rank.loader")
        found = []
        for rank in self._pool.ranks:
            ready = [message for message in rank.seen if isinstance(message, RankReady)]
            message = ready[0] if ready else rank.wait_for(RankReady)
            peak = processes.peak_resident_bytes(rank.process.pid)
            found.append(RankFacts(message.bytes_read, peak - bare.peak_resident_bytes))
        return found

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send the requests over the socket pair."""
        assert self._pool is not None
        assert self._tokenizer is not None
        pool = self._pool
        prompts = [encode(self._tokenizer, ask) for ask in asks]
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
            answer_of(prompt, pool.outcomes.pop(name).tokens, marks[name])
            for prompt, name in zip(prompts, names, strict=True)
        ]

    def hold(self) -> None:
        """Do nothing: idle ranks wait in the kernel."""

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
