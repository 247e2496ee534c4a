"""The common interface of the two programs: start, ask, hold, close.

``k2_sides`` and ``mlx_sides`` have each as a server over HTTP and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from benchmarks import processes
from benchmarks.client import Ask
from benchmarks.statistics import Answer
from k2cli.models.text.tokenizer import Tokenizer

Strategy = Literal["single", "pipeline", "tensor"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Model, strategy and limits for both programs. ``folder`` is for logs and state."""

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
        return 1 if self.strategy == "single" else 2


@dataclass(frozen=True, slots=True)
class RankFacts:
    """Cost of loading for one rank: bytes read of the checkpoint, and peak memory."""

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


def first_answer(side: Side) -> None:
    """Ask for one token: a program is up once it answers."""
    side.ask([Ask(" bab bac", 1)])


def encode(tokenizer: Tokenizer, ask: Ask) -> list[int]:
    """Return the prompt tokens of a request."""
    if isinstance(ask.prompt, str):
        return tokenizer.encode(ask.prompt)
    return tokenizer.encode(tokenizer.chat_prompt([dict(message) for message in ask.prompt]))


def answer_of(prompt: list[int], tokens: list[int], marks: list[tuple[float, int]]) -> Answer:
    """Make an answer of tokens and ``marks`` of (seconds, tokens so far)."""
    content = " ".join(map(str, tokens))
    return Answer(len(prompt), len(tokens), tuple(marks), content)
