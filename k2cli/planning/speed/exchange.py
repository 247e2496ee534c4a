"""The exchange by which placements are compared: a prompt and its answer, for every sequence.

Prompts are computed one after the other, then all answers together. Attention counts at the depth
that the exchange reaches, not at the longest context for which there is memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from k2cli.planning.hardware.machine import NodeRates
from k2cli.planning.speed.placement_time import (
    CHUNKS_PER_STAGE,
    LEAST_OVERLAP_TOKENS,
    PlacementTime,
    StageWork,
    decode_time,
    prefill_time,
)

PROMPT_TOKENS, ANSWER_TOKENS = 2000, 500
"""Everyday lengths, unless the user names others."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and an answer, in tokens, with ``concurrency`` sequences at the same time."""

    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    concurrency: int = 1

    def within(self, context_length: int) -> Exchange:
        """Return the exchange, shortened to what fits a context: first the prompt."""
        answer = max(1, min(self.answer_tokens, context_length // 2))
        prompt = max(1, min(self.prompt_tokens, context_length - answer))
        return replace(self, prompt_tokens=prompt, answer_tokens=answer)

    @property
    def depth(self) -> int:
        """Tokens in the cache when half of the answer is there."""
        return self.prompt_tokens + self.answer_tokens // 2

    def groups(self, stages: int) -> int:
        """Return the number of groups of sequences that a pipeline runs at the same time."""
        return min(self.concurrency, stages)

    def rows(self, stages: int) -> int:
        """Return the sequences of a group."""
        return -(-self.concurrency // self.groups(stages))

    def chunks(self, chunk_tokens: int, stages: int) -> list[int]:
        """Return the tokens of each chunk of the prompt, as the engine cuts it."""
        size = chunk_tokens
        if stages > 1:
            overlapping = -(-self.prompt_tokens // (CHUNKS_PER_STAGE * stages))
            size = min(size, max(LEAST_OVERLAP_TOKENS, overlapping))
        whole, rest = divmod(self.prompt_tokens, size)
        return [size] * whole + ([rest] if rest else [])


@dataclass(frozen=True, slots=True)
class StageTime:
    """Time that one rank computes in an exchange.

    Prefill is that of one whole prompt, decode that of one step for the sequences of a group.
    """

    rank: int
    prefill_seconds: float
    decode_seconds: float


def exchange_seconds(run: PlacementTime, exchange: Exchange, chunk_tokens: int) -> float:
    """Return the expected seconds of an exchange with every sequence."""
    prompts = exchange.concurrency * run.prefill_seconds(exchange.prompt_tokens, chunk_tokens)
    step = run.round_seconds(exchange.depth, exchange.concurrency)
    return prompts + exchange.answer_tokens * step


def stage_prefill_seconds(
    stage: StageWork, rates: NodeRates, exchange: Exchange, chunks: list[int]
) -> float:
    """Return the seconds that a stage computes for one prompt, chunk by chunk."""
    return sum(
        count * prefill_time(stage, rates, size, done).seconds
        for size, done, count in _alike(stage, chunks)
    )


def _alike(stage: StageWork, chunks: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (tokens, tokens before it, number of chunks like it).

    Without a window of attention the time of a chunk is linear in the tokens before it, so whole
    chunks together take as long as the middle one times their number: those before latent attention
    is absorbed, and those from there on.
    """
    if not chunks:
        return
    windows = any(layer.window_tokens is not None for layer, _ in stage.layers)
    size, rest = chunks[0], chunks[-1]
    whole = len(chunks) - (rest != size)
    if windows:
        for number in range(whole):
            yield size, number * size, 1
    else:
        absorbed = {layer.first_absorbed(size, whole) for layer, _ in stage.layers if layer.latent}
        for first, past_last in pairwise(sorted({0, whole, *absorbed})):
            yield size, (first + past_last - 1) * size // 2, past_last - first
    if rest != size:
        yield rest, whole * size, 1


def stage_times(run: PlacementTime, exchange: Exchange, chunk_tokens: int) -> tuple[StageTime, ...]:
    """Return the times of each rank in an exchange."""
    stages = run.placement.size if run.is_pipeline else 1
    chunks = exchange.chunks(chunk_tokens, stages)
    rows = exchange.rows(stages)
    return tuple(
        StageTime(
            rank,
            stage_prefill_seconds(part, rates, exchange, chunks),
            decode_time(part, rates, exchange.depth, rows).seconds,
        )
        for rank, (part, rates) in enumerate(zip(run.parts, run.rates, strict=True))
    )
