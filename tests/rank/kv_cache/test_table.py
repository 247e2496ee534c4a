"""Caches of sequences that join and leave batches."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from k2cli.protocol import CloseSequence
from k2cli.rank.kv_cache.table import CacheTable, _released
from k2cli.rank.loader import load_part
from tests.support.rank_pool import assignments


def test_sequences_that_hold_nothing_yet_leave_a_batch(toy_k2: Path) -> None:
    """Prompts of one token, cancelled before the first step."""
    [assignment] = assignments(toy_k2, "single", 1)
    table = CacheTable(load_part(assignment, None, lambda done, total: None).stage)
    for sequence in range(3):
        table.open(sequence, None, 0)
        table.join(0, sequence)
    table.leave(0, 0, CloseSequence(1, 0))
    table.leave(0, 1, CloseSequence(2, 1), move_to=1)
    assert {batch: entry.rows for batch, entry in table.batches.items()} == {0: [2], 1: [1]}
    assert all(cache.empty() for entry in table.batches.values() for cache in entry.caches)


def test_a_copy_that_is_never_given_back_is_not_waited_for_long() -> None:
    # A GPU releases an outgrown copy a little late, and never if a kept prefix shares it.
    held = mx.zeros((1024, 1024))
    mx.eval(held)
    active = mx.get_active_memory()
    assert _released(active)
    assert not _released(active - held.nbytes)


def test_whole_pages_and_reused_arrays_are_not_taken_for_an_old_copy() -> None:
    # On Metal keys and values of 256 tokens take up to three pages of 16 KiB more each.
    active = mx.get_active_memory()
    assert _released(active - 2 * 3 * 2**14)
