"""Time of every stage that a node could hold, and the split with the fastest exchange.

Matrices are as in ``pipeline``: ``[first, past_last]`` is the stage with these layers. An exchange
takes as long as its slowest stage needs for the prompt, and as all stages together, or the slowest
group by group, need for the answer. So the split is sought under limits on the slowest stages: for
each pair of limits, dynamic programming finds the split with the least sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from k2cli.choices import Device
from k2cli.planning.hardware.machine import NodeMemory, NodeRates
from k2cli.planning.search.best_split import Ranges, best_split, cheapest_split
from k2cli.planning.search.traced_model import Slices
from k2cli.planning.speed.constants import fitted_constants
from k2cli.planning.speed.exchange import Exchange, stage_prefill_seconds
from k2cli.planning.speed.placement_time import StageWork, decode_time
from k2cli.planning.speed.work import LayerWork

STABLE_SHARE = 0.01
"""Gain that is too small to prefer a split to the one whose slowest stage decodes fastest."""

_LIKE_SHARE = 0.002
"""Limits closer than this share are taken together."""

_OPERATIONS_PER_BYTE: dict[Device, float] = {"cpu": 4.0, "metal": 35.0, "cuda": 10.0}
"""Assumed ratio of compute to bandwidth, as MLX reaches them, where a machine's speed is not known.

Metal: the fitted constants for an M3 Ultra. CUDA: full-width layers of K2 on H200s with MLX 0.32.4,
where products of experts are far from the chip's peak (1,200 tokens a second of 10 GFLOP on two of
them, 0.43 ms to read 322 MB). CPU: a token of a prompt takes about as long as one alone.
"""


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of every stage on one node: for one whole prompt, and for a decode step of a group.

    Nodes of unknown speed are taken to be equally fast; then the unit is the reading of a byte.
    """

    prefill: Any
    decode: Any


@dataclass(frozen=True, slots=True)
class Timing:
    """The numbers that turn stage seconds into those of an exchange; times as ``StageSeconds``."""

    exchange: Exchange
    chunks: int
    stages: int
    hop_seconds: float = 0.0
    latency_seconds: float = 0.0

    def seconds(self, prefills: Sequence[float], decodes: Sequence[float]) -> float:
        """Return the time of an exchange with every sequence, of stages with these times.

        It is that of ``PlacementTime``, with each chunk as long as the average one.
        """
        slowest, whole = max(prefills), sum(prefills)
        prompt = slowest + (whole - slowest) / self.chunks
        groups = self.exchange.groups(self.stages)
        through = sum(decodes) + self.stages * self.hop_seconds
        step = max(through, groups * (max(decodes) + self.latency_seconds))
        return self.exchange.concurrency * prompt + self.exchange.answer_tokens * step


def stage_seconds(
    whole: Slices, node: NodeMemory, exchange: Exchange, chunk_tokens: int, stages: int
) -> StageSeconds:
    """Compute the times of every stage on a node."""
    count, work = whole.profile.layer_count, whole.work
    if work is None:
        equal = _sums([1.0] * count)
        return StageSeconds(equal, equal)
    rates = fitted_constants().rates(node) or _assumed(node.device)
    chunks, rows = exchange.chunks(chunk_tokens, stages), exchange.rows(stages)
    known: dict[LayerWork, tuple[float, float]] = {}
    for layer in work.layers:
        if layer not in known:
            part = StageWork(((layer, 1),), None)
            known[layer] = (
                stage_prefill_seconds(part, rates, exchange, chunks),
                decode_time(part, rates, exchange.depth, rows).seconds,
            )
    prefill = _sums([known[layer][0] for layer in work.layers])
    decode = _sums([known[layer][1] for layer in work.layers])
    decode[:, -1] += decode_time(StageWork((), work.head), rates, exchange.depth, rows).seconds
    return StageSeconds(prefill, decode)


def _assumed(device: Device) -> NodeRates:
    operations = _OPERATIONS_PER_BYTE[device]
    return NodeRates(1.0, operations, operations, operations, 0.0, 0.0)


def _sums(layers: list[float]) -> Any:
    import numpy as np

    before = np.array(list(accumulate(layers, initial=0.0)))
    return before[None, :] - before[:, None]


def fastest_split(
    stages: Sequence[StageSeconds],
    allowed: Sequence[Any],
    weights: Sequence[Any],
    timing: Timing,
    below: float = math.inf,
) -> tuple[float, Ranges] | None:
    """Find the split with the fastest exchange, and its seconds; None if none is allowed.

    The split whose slowest stage decodes fastest is kept unless another one gains more than
    ``STABLE_SHARE``.

    Args:
        stages: times of each stage's node, first stage first.
        allowed: booleans, true where the node has memory for the stage.
        weights: factors close to 1, by which equally fast splits are compared.
        timing: of the exchange.
        below: seconds; if no split takes less, any of them may be returned.
    """
    search = _Search(stages, allowed, weights, timing)
    steady = search.tightest("decode")
    if steady is None:
        return None
    at_first = search.timed(steady[1])
    best = search.best(at_first, steady[0], below)
    return at_first if at_first[0] <= best[0] * (1 + STABLE_SHARE) else best


_Timed = tuple[float, Ranges]
_Part = Literal["prefill", "decode"]


class _Search:
    """Search for a split under limits on the slowest stage's prefill and decode."""

    def __init__(
        self,
        stages: Sequence[StageSeconds],
        allowed: Sequence[Any],
        weights: Sequence[Any],
        timing: Timing,
    ) -> None:
        import numpy as np

        self.stages, self.timing = stages, timing
        prompts = timing.exchange.concurrency / timing.chunks
        forward = np.triu(np.ones_like(allowed[0], dtype=bool), 1)
        self._allowed = [fits & forward for fits in allowed]
        self._costs = [
            np.where(
                fits,
                weight * (prompts * each.prefill + timing.exchange.answer_tokens * each.decode),
                np.inf,
            )
            for each, fits, weight in zip(stages, self._allowed, weights, strict=True)
        ]
        self._values: dict[_Part, Any] = {}

    def timed(self, ranges: Ranges) -> _Timed:
        """Return a split with the time of its exchange."""
        pairs = list(zip(self.stages, ranges, strict=True))
        prefills = [float(each.prefill[span]) for each, span in pairs]
        decodes = [float(each.decode[span]) for each, span in pairs]
        return self.timing.seconds(prefills, decodes), ranges

    def tightest(self, by: _Part, most_prefill: float = math.inf) -> tuple[float, Ranges] | None:
        """Find the split with the least slowest stage, and that stage's time, within a limit."""
        import numpy as np

        slowest = [
            np.where(fits & (each.prefill <= most_prefill), _times(each, by), np.inf)
            for each, fits in zip(self.stages, self._allowed, strict=True)
        ]
        return best_split(slowest, self._costs)

    def cheapest(
        self, most_prefill: float = math.inf, most_decode: float = math.inf
    ) -> Ranges | None:
        """Find the split with the least sum of times within the limits."""
        import numpy as np

        costs = self._costs
        for by, most in (("prefill", most_prefill), ("decode", most_decode)):
            if most < math.inf:
                costs = [
                    np.where(_times(each, by) <= most, cost, np.inf)
                    for each, cost in zip(self.stages, costs, strict=True)
                ]
        return cheapest_split(costs)

    def best(self, at_first: _Timed, least_decode: float, below: float) -> _Timed:
        """Return the fastest split; ``at_first`` is one of them. ``below`` as above."""
        timing, exchange = self.timing, self.timing.exchange
        quickest, cheapest = self.tightest("prefill"), self.cheapest()
        assert quickest is not None
        assert cheapest is not None
        best = min(at_first, self.timed(cheapest), key=lambda each: each[0])
        groups = exchange.groups(timing.stages)
        prompts = exchange.concurrency * (1 - 1 / timing.chunks)
        answer = exchange.answer_tokens * groups * (least_decode + timing.latency_seconds)
        for most_prefill in self._limits("prefill", quickest[0]):
            lowest = prompts * most_prefill * (1 - _LIKE_SHARE)
            if lowest + answer >= min(best[0], below):
                break
            free = self.cheapest(most_prefill)
            if free is None:
                continue
            best = min(best, self.timed(free), key=lambda each: each[0])
            if groups > 1:
                best = self._grouped(best, most_prefill, lowest, free, below)
        return best

    def _grouped(
        self, best: _Timed, most_prefill: float, lowest: float, free: Ranges, below: float
    ) -> _Timed:
        """Return the fastest split under a limit on prefill, by limits on decode."""
        timing, exchange = self.timing, self.timing.exchange
        tight = self.tightest("decode", most_prefill)
        assert tight is not None
        slowest_free = max(
            float(each.decode[span]) for each, span in zip(self.stages, free, strict=True)
        )
        groups = exchange.answer_tokens * exchange.groups(timing.stages)
        for most_decode in self._limits("decode", tight[0]):
            if most_decode >= slowest_free or lowest + groups * most_decode >= min(best[0], below):
                break
            found = self.cheapest(most_prefill, most_decode)
            if found is not None:
                best = min(best, self.timed(found), key=lambda each: each[0])
        return best

    def _limits(self, of: _Part, least: float) -> Iterator[float]:
        """Yield the times of stages from ``least`` on, of nearly equal ones the longest."""
        import numpy as np

        if of not in self._values:
            pairs = zip(self.stages, self._allowed, strict=True)
            found = np.concatenate([_times(each, of)[fits] for each, fits in pairs])
            self._values[of] = np.unique(found)
        values = self._values[of]
        at = int(np.searchsorted(values, least * (1 - 1e-12)))
        while at < len(values):
            past = int(np.searchsorted(values, values[at] * (1 + _LIKE_SHARE), side="right"))
            yield float(values[past - 1])
            at = past


def _times(stage: StageSeconds, of: str) -> Any:
    return stage.prefill if of == "prefill" else stage.decode
