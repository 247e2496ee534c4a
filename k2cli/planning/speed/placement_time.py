"""How long a placement takes: the ranks' times put together as the engine runs them.

One request alone passes all stages of a pipeline one after the other; several keep all of them at
work. Tensor ranks work at the same time and wait for each other at every collective.
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

# As in rank/engine/engine.py: a pipeline cuts a prompt so that its stages overlap. The engine may
# find that smaller chunks are worth it; until then it takes these.
CHUNKS_PER_STAGE = 4
LEAST_OVERLAP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class StageWork:
    """The layers of one rank, equal ones together with their number; ``head`` if it samples."""

    layers: tuple[tuple[LayerWork, int], ...]
    head: LayerWork | None

    @property
    def all(self) -> tuple[tuple[LayerWork, int], ...]:
        """Layers, and the head where there is one."""
        return self.layers if self.head is None else (*self.layers, (self.head, 1))


def stage_of(work: ModelWork, layers: tuple[int, int]) -> StageWork:
    """The part of a model that a rank with these half-open layers computes."""
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
        """All of it."""
        return self.memory_seconds + self.attention_seconds + self.fixed_seconds


def decode_time(
    stage: StageWork, rates: NodeRates, context_length: int, rows: int = 1
) -> DecodeTime:
    """One token for each of ``rows`` sequences, all at the same context.

    Matrices of several rows are computed while weights are read, so the longer of the two counts.
    A single row has kernels of its own, which do little but read.
    """
    weights = sum(count * layer.weights_read(rows) for layer, count in stage.all)
    cache = rows * sum(count * layer.cache_read(context_length) for layer, count in stage.layers)
    matrices = sum(count * _matrix_seconds(layer, rates) for layer, count in stage.all)
    compute = rows * matrices / rates.rows_share if rows > 1 else 0.0
    pairs = sum(
        count * layer.decode_pair_flops * _attended(layer, context_length)
        for layer, count in stage.layers
    )
    return DecodeTime(
        weights,
        cache,
        max((weights + cache) / rates.read_bytes_per_second, compute),
        rows * pairs / (rates.attention_flops_per_second * rates.decode_attention_share),
        _fixed_seconds(stage, rates),
    )


def _fixed_seconds(stage: StageWork, rates: NodeRates) -> float:
    return sum(
        count * (rates.expert_layer_seconds if layer.experts else rates.dense_layer_seconds)
        for layer, count in stage.layers
    )


def _matrix_seconds(layer: LayerWork, rates: NodeRates) -> float:
    """Multiplying one token with a layer's matrices, at the rates of long prompts."""
    dense = layer.dense_flops / rates.dense_flops_per_second
    return dense + layer.expert_flops / rates.expert_flops_per_second


def _attended(layer: LayerWork, context_length: int) -> int:
    windows = [part.window_tokens for part in layer.cache if part.window_tokens is not None]
    return min([context_length, *windows])


@dataclass(frozen=True, slots=True)
class PrefillTime:
    """Seconds of one chunk of a prompt, by cause."""

    read_seconds: float
    matrix_seconds: float
    attention_seconds: float
    fixed_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.read_seconds + self.matrix_seconds + self.attention_seconds + self.fixed_seconds


def prefill_time(
    stage: StageWork, rates: NodeRates, chunk_tokens: int, context_length: int
) -> PrefillTime:
    """A chunk of a prompt that is preceded by ``context_length`` tokens. The head is not needed."""
    seen = context_length + chunk_tokens
    average = context_length + chunk_tokens / 2
    read = pairs = expanded = matrices = 0.0
    for layer, count in stage.layers:
        window = layer.window_tokens
        read += count * layer.weights_read(chunk_tokens)
        matrices += count * _matrix_seconds(layer, rates)
        pairs += count * layer.pair_flops * (average if window is None else min(average, window))
        expanded += count * layer.expand_flops * seen
    return PrefillTime(
        read / rates.read_bytes_per_second,
        chunk_tokens * matrices,
        chunk_tokens * pairs / rates.attention_flops_per_second
        + expanded / rates.dense_flops_per_second,
        _fixed_seconds(stage, rates),
    )


@dataclass(frozen=True, slots=True)
class PlacementTime:
    """A placement with what it is made of; all times in seconds, of one request alone unless said.

    ``parts`` are what the ranks compute; made from ``work`` if not given.
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
        """Whether each rank computes some of the layers."""
        return self.placement.strategy == "pipeline"

    def _together(self, rank: int) -> NodeRates:
        """Rates while all ranks compute: those on one machine share it."""
        return self.rates[rank].shared_by(self.machines.count(self.machines[rank]))

    def slower(self) -> PlacementTime:
        """The same, if the link is as slow as has been seen and attention half as fast."""
        return self._changed(self.link.collective_seconds_high, 0.5)

    def faster(self) -> PlacementTime:
        """The same, if the link is as fast as has been seen and attention twice as fast."""
        return self._changed(self.link.collective_seconds_low, 2.0)

    def _changed(self, latency: float, attention: float) -> PlacementTime:
        rates = tuple(
            replace(each, attention_flops_per_second=each.attention_flops_per_second * attention)
            for each in self.rates
        )
        return replace(self, rates=rates, link=replace(self.link, collective_seconds=latency))

    def slowest(self, context_length: int, rows: int = 1) -> DecodeTime:
        """Of single or tensor: the rank that the others wait for."""
        times = [
            decode_time(self.parts[rank], self._together(rank), context_length, rows)
            for rank in range(self.placement.size)
        ]
        return max(times, key=lambda time: time.seconds)

    def stages(self, context_length: int, rows: int = 1) -> list[DecodeTime]:
        """Of a pipeline: each stage while it computes alone."""
        return [
            decode_time(self.parts[rank], self.rates[rank], context_length, rows)
            for rank in range(self.placement.size)
        ]

    def exchange_seconds(self, tokens: int) -> float:
        """What travels for a step over so many tokens: hidden states, or partial sums."""
        if self.placement.size == 1:
            return 0.0
        latency = self.link.collective_seconds
        one = latency + tokens * self.work.hidden_bytes / self.link.bytes_per_second
        if self.is_pipeline:
            # From stage to stage, and the chosen token back to the first.
            return one * (self.placement.size - 1) + latency
        return one * self.work.collectives

    def decode_seconds(self, context_length: int) -> float:
        """One token of one request alone."""
        exchange = self.exchange_seconds(1)
        if self.is_pipeline:
            return exchange + sum(time.seconds for time in self.stages(context_length))
        return exchange + self.slowest(context_length).seconds

    def round_seconds(self, context_length: int, concurrency: int) -> float:
        """One token of each of so many requests. A pipeline works on several groups at a time."""
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
        """A prompt of one request, chunk by chunk. The stages of a pipeline overlap."""
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
        # The other stages still have to take in the last chunk, or had to be filled by the first.
        times = self._chunk_seconds(last, done)
        return total + sum(times) - max(times)

    def _chunks_seconds(self, count: int, chunk_tokens: int) -> float:
        """The busiest machine's time for so many whole chunks, one after the other.

        A machine's time for a chunk is linear in what comes before it, between the chunks at which
        a window of attention is full. So 4,000 chunks cost no more to add up than four.
        """
        full = {
            min(max(math.ceil(layer.window_tokens / chunk_tokens - 0.5), 0), count)
            for part in self.parts
            for layer, _ in part.layers
            if layer.window_tokens is not None
        }
        bounds = sorted({0, count, *full})
        busiest = sum(
            self._linear_seconds(first, past_last, chunk_tokens)
            for first, past_last in pairwise(bounds)
        )
        return busiest + count * self.exchange_seconds(chunk_tokens)

    def _linear_seconds(self, first: int, past_last: int, chunk_tokens: int) -> float:
        """The sum over chunks of the busiest machine's time, each machine's being linear.

        The machine that is busiest at both ends is so between them; else halves are looked at.
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
        """What a chunk takes on each machine: ranks on one machine take turns."""
        return self._by_machine(
            [
                prefill_time(stage, rates, tokens, done).seconds
                for stage, rates in zip(self.parts, self.rates, strict=True)
            ]
        )

    def _by_machine(self, times: Sequence[float]) -> list[float]:
        """Ranks' times, each computing alone, added up by machine."""
        return [
            sum(time for time, name in zip(times, self.machines, strict=True) if name == machine)
            for machine in dict.fromkeys(self.machines)
        ]

    def first_token_seconds(self, prompt_tokens: int, chunk_tokens: int) -> float:
        """Until the first token of an answer: the prompt less its last token, and one step."""
        prefill = self.prefill_seconds(prompt_tokens, chunk_tokens)
        return prefill + self.decode_seconds(prompt_tokens)
