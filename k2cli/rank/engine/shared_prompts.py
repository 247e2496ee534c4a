"""Prompts that are computed for several requests at once: one computes, and the others wait for it.

A cache is kept for others once its request has ended. Requests of the same prompt that come at the
same time would each compute it: so the cache of a prompt is kept as soon as it is computed, if
another request waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from k2cli.rank.engine.prefixes.tree import common_length
from k2cli.rank.engine.requests import Running, Waiting

_LEAST_SHARED_TOKENS = 256
"""Of what a request need not compute itself. Shorter prompts are computed together instead."""


def awaited_row(
    waiting: Waiting, prefilling: Iterable[Running], counter_of: Callable[[str], float]
) -> Running | None:
    """Return the running request whose prompt this one waits for; None if it need not.

    It waits at most about twice as long as it would take to compute the same tokens itself: it
    would have to share the device with the other request meanwhile. So it does not wait for one of
    another key whose turn comes much later.

    Args:
        waiting: a request that waits.
        prefilling: the requests whose prompts are computed.
        counter_of: the work that was done for a key, by its id.
    """
    request = waiting.request
    if not request.use_prefix_cache or waiting.paused is not None:
        return None
    for row in prefilling:
        other = row.request
        if (
            row.cancelled
            or not other.use_prefix_cache
            or other.prefix_scope != request.prefix_scope
        ):
            continue
        if row.sequence not in waiting.common:
            waiting.common[row.sequence] = _common_length(request.prompt, other.prompt)
        shared = min(waiting.common[row.sequence], len(request.prompt) - 1, row.prefill_target)
        gain = shared - max(waiting.cached_tokens, row.cached)
        if gain < max(_LEAST_SHARED_TOKENS, row.prefill_left / 2):
            continue
        ahead = counter_of(other.owner) - row.units - counter_of(request.owner)
        if other.owner == request.owner or ahead <= gain:
            return row
    return None


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin; 0 if those are few."""
    if one[:_LEAST_SHARED_TOKENS] != other[:_LEAST_SHARED_TOKENS]:
        return 0
    return common_length(one, other)
