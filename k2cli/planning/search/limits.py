"""How far a demand could go on given hardware: the longest context, the most sequences.

More of either never needs less memory, so both are found by halving. The prefill chunk may
become as small as need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from k2cli.choices import Strategy
from k2cli.errors import UsageError
from k2cli.planning.config_check import model_context_length
from k2cli.planning.model import MAX_CONTEXT_LENGTH
from k2cli.planning.request import MAX_CONCURRENCY
from k2cli.planning.search.candidates import Ground, fits_somehow


def greatest(fits: Callable[[int], bool], most: int) -> int:
    """The greatest number from 1 to ``most`` that fits, or 0; ``fits`` must be monotone.

    Looks around 1 and ``most`` first, then halves: about ``log2(most)`` calls.
    """
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def max_context_length(ground: Ground, strategies: Sequence[Strategy]) -> int:
    """The longest context, at the asked concurrency, that fits with any of some strategies."""
    most = model_context_length(ground.model.subject.config) or MAX_CONTEXT_LENGTH

    def fits(context_length: int) -> bool:
        demand = replace(ground.demand, context_length=context_length)
        return _fits_any(replace(ground, demand=demand), strategies)

    return greatest(fits, most)


def max_concurrency(ground: Ground, strategies: Sequence[Strategy]) -> int:
    """The most sequences, at the asked context, that fit with any of some strategies."""

    def fits(concurrency: int) -> bool:
        demand = replace(ground.demand, concurrency=concurrency)
        return _fits_any(replace(ground, demand=demand), strategies)

    return greatest(fits, MAX_CONCURRENCY)


def _fits_any(ground: Ground, strategies: Sequence[Strategy]) -> bool:
    for strategy in strategies:
        try:
            if fits_somehow(ground, strategy):
                return True
        except UsageError:  # impossible for this model or number of nodes, at any length
            continue
    return False
