"""Room for KV caches: what requests may need at most, and in which batch there is room for it.

The plan's KV budget is ``context_length * concurrency`` tokens on every rank. A batch is as long
as its longest row, so a batch's worst case is its number of rows times the longest worst case.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from k2cli.rank.engine.prefixes.tree import cache_tokens

MAX_BATCH_ROWS = 32


@dataclass(frozen=True, slots=True)
class Budget:
    """Room for KV caches, in tokens, and the number of batches that run side by side."""

    tokens: int
    batches: int
    rows_per_batch: int = MAX_BATCH_ROWS


def worst_case_tokens(prompt: int, max_tokens: int, context_length: int) -> int:
    """Return the most tokens that a request's cache may hold."""
    return cache_tokens(min(prompt + max_tokens, context_length))


def used_tokens(batches: Mapping[int, Sequence[int]]) -> int:
    """Return the worst case of all batches, given the worst cases of their rows."""
    return sum(len(rows) * max(rows, default=0) for rows in batches.values())


def choose_batch(
    batches: Mapping[int, Sequence[int]], worst_case: int, budget: Budget
) -> int | None:
    """Choose the batch that a new request should join; None if it must wait.

    It is the batch with the fewest rows, so that all pipeline stages have work, in which the
    worst case of all batches stays within the budget.

    Args:
        batches: worst cases in tokens of each batch's rows, for every batch that may be used.
    """
    order = sorted(batches, key=lambda batch: (len(batches[batch]), batch))
    for batch in order:
        if len(batches[batch]) >= budget.rows_per_batch:
            continue
        with_it = {**batches, batch: [*batches[batch], worst_case]}
        if used_tokens(with_it) <= budget.tokens:
            return batch
    return None


def batches_with_room(
    batches: Mapping[int, Sequence[int]],
    usual: Collection[int],
    guest: int | None,
    worst_case: int,
    budget: Budget,
) -> Iterator[int]:
    """Yield the batches in which a new request has room, the best first.

    Args:
        batches: worst cases in tokens of each batch's rows.
        usual: the batches for any request.
        guest: the batch for short ones; None if it is not for this one.
    """
    for allowed in (usual, () if guest is None else (guest,)):
        others = {batch: rows for batch, rows in batches.items() if batch not in allowed}
        left = replace(budget, tokens=budget.tokens - used_tokens(others))
        batch = choose_batch({batch: batches[batch] for batch in allowed}, worst_case, left)
        if batch is not None:
            yield batch
