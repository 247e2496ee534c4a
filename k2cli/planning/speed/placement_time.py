"""The time of a placement: the steps of its ranks, combined as the engine runs them.

A decode step of one rank is bound by reading weights and cache; beside that, launching a few dozen
small operations costs a fixed time per layer. A chunk of a prompt is bound by operations, and reads
the weights once as well. Rates are effective ones, below the published peaks (``constants.py``).

One request alone passes the stages of a pipeline one after the other; several keep all stages busy.
Tensor ranks work at the same time and wait for each other at every collective.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from k2cli.planning.hardware.machine import NodeRates
from k2cli.planning.speed.constants import LinkRates
from k2cli.planning.speed.work import LayerWork, ModelWork
from k2cli.sharding.placement import Placement

# The engine (rank/engine/engine.py) cuts a prompt like this, so that a pipeline's stages overlap.
# It starts with these chunks, and may change to smaller ones if they are faster.
CHUNKS_PER_STAGE = 4
LEAST_OVERLAP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class StageWork:
    """The layers of one rank, each with its number of equal ones; ``head`` if it samples."""

    layers: tuple[tuple[LayerWork, int], ...]
    head: LayerWork | None

    @property
    def all(self) -> tuple[tuple[LayerWork, int], ...]:
        """Layers, and the head if there is one."""
        return self.layers if self.head is None else (*self.layers, (self.head, 1))


def stage_of(work: ModelWork, layers: tuple[int, int]) -> StageWork:
    """Return the part of a model that a rank with these half-open layers computes."""
    first, past_last = layers
    head = work.head if past_last == len(work.layers) else None
    return StageWork(tuple(Counter(work.layers[first:past_last]).items()), head)


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """Seconds of one decode step, by cause, and the bytes that it reads."""

    weights_bytes: float
    cache_bytes: float
    memory_seconds: float
    attention_seconds: float
    fixed_seconds: float

    @property
    def seconds(self) -> float:
        return self.memory_seconds + self.attention_seconds + self.fixed_seconds


def decode_time(
    stage: StageWork, rates: NodeRates, context_length: int, rows: int = 1
) -> DecodeTime:
    """Compute the time of one token for each of ``rows`` sequences, all at the same context.

    Matrices of several rows are computed while weights are read, so the longer of the two counts.
    A single row has kernels of its own, which do little but read.
    """
    weights = sum(count * layer.weights_read(rows) for layer, count in stage.all)
    cache = rows * sum(count * layer.cache_read(context_length) for layer, count in stage.layers)
    matrices = sum(count * _matrix_seconds(layer, rates) for layer, count in stage.all)
    compute = rows * matrices / rates.rows_share if rows > 1 else 0.0
    loads = rates.load_bytes_per_second
    reading = weights / rates.read_bytes_per_second + rows * sum(
        count * layer.cache_seconds(context_length, rates.read_bytes_per_second, loads)
        for layer, count in stage.layers
    )
    pairs = sum(
        count * layer.attention_flops(context_length, loads_known=loads is not None)
        for layer, count in stage.layers
    )
    return DecodeTime(
        weights,
        cache,
        max(reading, compute),
        rows * pairs / (rates.attention_flops_per_second * rates.decode_attention_share),
        _fixed_seconds(stage, rates),
    )


def _fixed_seconds(stage: StageWork, rates: NodeRates) -> float:
    return sum(
        count * (rates.expert_layer_seconds if layer.experts else rates.dense_layer_seconds)
        for layer, count in stage.layers
    )


def _matrix_seconds(layer: LayerWork, rates: NodeRates) -> float:
    """Return the seconds to multiply one token with a layer's matrices, at a prompt's rates."""
    dense = layer.dense_flops / rates.dense_flops_per_second
    return dense + layer.expert_flops / rates.expert_flops_per_second


@dataclass(frozen=True, slots=True)
class PrefillTime:
    """Seconds of one chunk of a prompt, by cause."""

    read_seconds: float
    matrix_seconds: float
    attention_seconds: float
    fixed_seconds: float

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.matrix_seconds + self.attention_seconds + self.fixed_seconds


def prefill_time(
    stage: StageWork, rates: NodeRates, chunk_tokens: int, context_length: int
) -> PrefillTime:
    """Compute the time of a chunk of a prompt after ``context_length`` tokens, without the head."""
    seen = context_length + chunk_tokens
    average = context_length + chunk_tokens / 2
    read = pairs = expanded = matrices = 0.0
    for layer, count in stage.layers:
        window = layer.window_tokens
        read += count * layer.weights_read(chunk_tokens)
        matrices += count * _matrix_seconds(layer, rates)
        absorbed = layer.is_absorbed(chunk_tokens, context_length)
        each = layer.decode_pair_flops if absorbed else layer.pair_flops
        pairs += count * each * (average if window is None else min(average, window))
        expanded += 0 if absorbed else count * layer.expand_flops * seen
    return PrefillTime(
        read / rates.read_bytes_per_second,
        chunk_tokens * matrices,
        chunk_tokens * pairs / rates.attention_flops_per_second
        + expanded / rates.dense_flops_per_second,
        _fixed_seconds(stage, rates),
    )


@dataclass(frozen=True, slots=True)
class PlacementTime:
    """A placement with its work, rates and link; times are in seconds, for one request alone.

    ``parts`` is the work of each rank; it is derived from ``work`` if not given.
    """

    work: ModelWork
    placement: Placement
    machines: tuple[str, ...]
    rates: tuple[NodeRates, ...]
    link: LinkRates
    parts: tuple[StageWork, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            parts = tuple(stage_of(self.work, part.layers) for part in self.placement.ranks)
            object.__setattr__(self, "parts", parts)

    @property
    def is_pipeline(self) -> bool:
        return self.placement.strategy == "pipeline"

    def _together(self, rank: int) -> NodeRates:
        """Return a rank's rates while all ranks compute: ranks on one machine share it."""
        return self.rates[rank].shared_by(self.machines.count(self.machines[rank]))

    def slower(self) -> PlacementTime:
        """Return the run with the slowest published link and half the speed of attention."""
        return self._changed(self.link.collective_seconds_high, 0.5)

    def faster(self) -> PlacementTime:
        """Return the run with the fastest published link and twice the speed of attention."""
        return self._changed(self.link.collective_seconds_low, 2.0)

    def _changed(self, latency: float, attention: float) -> PlacementTime:
        rates = tuple(each.with_attention(attention) for each in self.rates)
        return replace(self, rates=rates, link=replace(self.link, collective_seconds=latency))

    def slowest(self, context_length: int, rows: int = 1) -> DecodeTime:
        """Return the time of the slowest rank, for which the others wait (single and tensor)."""
        times = [
            decode_time(self.parts[rank], self._together(rank), context_length, rows)
            for rank in range(self.placement.size)
        ]
        return max(times, key=lambda time: time.seconds)

    def stages(self, context_length: int, rows: int = 1) -> list[DecodeTime]:
        """Return the time of each stage while it computes alone (pipeline)."""
        return [
            decode_time(self.parts[rank], self.rates[rank], context_length, rows)
            for rank in range(self.placement.size)
        ]

    def exchange_seconds(self, tokens: int) -> float:
        """Return the time of messages in a step over this many tokens."""
        if self.placement.size == 1:
            return 0.0
        latency = self.link.collective_seconds
        one = latency + tokens * self.work.hidden_bytes / self.link.bytes_per_second
        if self.is_pipeline:
            # Messages from stage to stage, and of the sampled token back to the first stage.
            return one * (self.placement.size - 1) + latency
        return one * self.work.collectives

    def decode_seconds(self, context_length: int) -> float:
        """Return the time of one token of one request alone."""
        exchange = self.exchange_seconds(1)
        if self.is_pipeline:
            return exchange + sum(time.seconds for time in self.stages(context_length))
        return exchange + self.slowest(context_length).seconds

    def round_seconds(self, context_length: int, concurrency: int) -> float:
        """Return the time of a token of every request; a pipeline runs several groups at once."""
        if not self.is_pipeline:
            exchange = self.exchange_seconds(concurrency)
            return exchange + self.slowest(context_length, concurrency).seconds
        groups = min(concurrency, self.placement.size)
        rows = math.ceil(concurrency / groups)
        times = [time.seconds for time in self.stages(context_length, rows)]
        through = sum(times) + self.exchange_seconds(rows)
        busiest = max(self._by_machine(times))
        return max(through, groups * (busiest + self.link.collective_seconds))

    def prefill_seconds(self, prompt_tokens: int, chunk_tokens: int) -> float:
        """Return the time of a prompt, chunk by chunk. The stages of a pipeline overlap."""
        if self.is_pipeline:
            pieces = CHUNKS_PER_STAGE * self.placement.size
            overlapping = max(LEAST_OVERLAP_TOKENS, -(-prompt_tokens // pieces))
            chunk_tokens = min(chunk_tokens, overlapping)
        whole, rest = divmod(prompt_tokens, chunk_tokens)
        total = self._chunks_seconds(whole, chunk_tokens)
        done, last = (whole - 1) * chunk_tokens, chunk_tokens
        if rest:
            done, last = whole * chunk_tokens, rest
            total += max(self._chunk_seconds(rest, done)) + self.exchange_seconds(rest)
        if not self.is_pipeline:
            return total
        # The other stages compute while the pipeline fills (first chunk) or drains (last chunk).
        times = self._chunk_seconds(last, done)
        return total + sum(times) - max(times)

    def _chunks_seconds(self, count: int, chunk_tokens: int) -> float:
        """Add up the busiest machine's time over whole chunks, one after the other.

        A machine's time for a chunk is linear in the tokens before it, between the chunks at which
        a window of attention is full, or from which on latent attention is absorbed. So 4,000
        chunks cost no more to add up than four.
        """
        absorbed = {
            layer.first_absorbed(chunk_tokens, count)
            for part in self.parts
            for layer, _ in part.layers
            if layer.latent is not None
        }
        full = {
            min(max(math.ceil(layer.window_tokens / chunk_tokens - 0.5), 0), count)
            for part in self.parts
            for layer, _ in part.layers
            if layer.window_tokens is not None
        }
        bounds = sorted({0, count, *full, *absorbed})
        busiest = sum(
            self._linear_seconds(first, past_last, chunk_tokens)
            for first, past_last in pairwise(bounds)
        )
        return busiest + count * self.exchange_seconds(chunk_tokens)

    def _linear_seconds(self, first: int, past_last: int, chunk_tokens: int) -> float:
        """Add up the busiest machine's time over chunks for which each machine's time is linear.

        A machine that is busiest at both ends is busiest between them; otherwise the range is
        halved.
        """
        count = past_last - first
        begin = self._chunk_seconds(chunk_tokens, first * chunk_tokens)
        if count == 1:
            return max(begin)
        end = self._chunk_seconds(chunk_tokens, (past_last - 1) * chunk_tokens)
        busiest = begin.index(max(begin))
        if end[busiest] == max(end):
            return (begin[busiest] + end[busiest]) * count / 2
        middle = first + count // 2
        return sum(
            self._linear_seconds(a, b, chunk_tokens)
            for a, b in ((first, middle), (middle, past_last))
        )

    def _chunk_seconds(self, tokens: int, done: int) -> list[float]:
        """Return the time of a chunk on each machine: ranks on one machine take turns."""
        return self._by_machine(
            [
                prefill_time(stage, rates, tokens, done).seconds
                for stage, rates in zip(self.parts, self.rates, strict=True)
            ]
        )

    def _by_machine(self, times: Sequence[float]) -> list[float]:
        """Add up the times of ranks, each computing alone, by machine."""
        return [
            sum(time for time, name in zip(times, self.machines, strict=True) if name == machine)
            for machine in dict.fromkeys(self.machines)
        ]

    def first_token_seconds(self, prompt_tokens: int, chunk_tokens: int) -> float:
        """Return the time to first token: the prompt without its last token, and one step."""
        prefill = self.prefill_seconds(prompt_tokens, chunk_tokens)
        return prefill + self.decode_seconds(prompt_tokens)

    def follow_up_seconds(self, tokens: int, context_length: int) -> float:
        """Return the time to first token of a prompt of which all but ``tokens`` are in the cache.

        It is that of one chunk, which passes the stages of a pipeline one after the other, and of
        one step.
        """
        kept = max(context_length - tokens, 0)
        chunk = max(min(tokens, context_length) - 1, 1)
        times = self._chunk_seconds(chunk, kept)
        computing = sum(times) if self.is_pipeline else max(times)
        return computing + self.exchange_seconds(chunk) + self.decode_seconds(context_length)
