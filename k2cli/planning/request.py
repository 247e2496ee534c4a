"""What a plan must have room for, and how it may be placed: a request, once it is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2cli.choices import Parallel, WantedTransport
from k2cli.errors import UsageError
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.memory.prefill import PREFILL_CHUNKS

MAX_CONCURRENCY = 4096
MAX_CHUNK_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class Demand:
    """What a plan must have room for, and how fast what connects its ranks is.

    ``chunk_tokens`` is None to choose the prefill chunk. ``transport`` and ``collective_seconds``
    only concern the predicted speed. ``free_order`` says that the first node need not lead.
    """

    context_length: int
    concurrency: int = 1
    chunk_tokens: int | None = None
    transport: WantedTransport = "auto"
    collective_seconds: float | None = None
    free_order: bool = False

    @property
    def chunks(self) -> tuple[int, ...]:
        """Prefill chunks to consider, largest first."""
        if self.chunk_tokens is not None:
            return (self.chunk_tokens,)
        useful = tuple(chunk for chunk in PREFILL_CHUNKS if chunk <= self.context_length)
        return useful or PREFILL_CHUNKS[-1:]


def check_amounts(
    concurrency: int, chunk_tokens: int | None, collective_seconds: float | None
) -> None:
    """Refuse amounts that cannot be meant.

    Raises:
        UsageError: naming the value and what is possible.
    """
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise UsageError(
            f"concurrency must be between 1 and {MAX_CONCURRENCY}, not {concurrency}",
            "--concurrency 4",
        )
    if chunk_tokens is not None and not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise UsageError(
            f"--chunk must be between 1 and {MAX_CHUNK_TOKENS} tokens, not {chunk_tokens}"
        )
    if collective_seconds is not None and not 0 < collective_seconds <= 1:
        raise UsageError(
            f"a collective that takes {collective_seconds * 1e6:g} us cannot be meant",
            "--collective-latency 26us",
        )


def check_nodes(nodes: Sequence[NodeMemory], strategy: Parallel) -> None:
    """Refuse no machines, or several for one.

    Raises:
        UsageError: with their number.
    """
    if not nodes:
        raise UsageError("a plan needs at least one node", "--hardware '2x m3-ultra-512'")
    if strategy == "single" and len(nodes) > 1:
        raise UsageError(
            f"--parallel single runs on one node, not on {len(nodes)}", "name one node only"
        )
