"""How long one rank takes for a step: work divided by a machine's effective rates.

A decode step is bound by reading weights and cache; what it costs beside that (launching a few
dozen small operations per layer) is a fixed time per layer. A chunk of a prompt is bound by
operations, and has to read the weights once as well. Rates are effective ones, already less than
the published peaks: ``speed_constants.py`` says by how much.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from k2cli.planning.speed.rates import NodeRates
from k2cli.planning.speed.work import LayerWork, ModelWork


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
