"""Drafts from a context, and the decision whether they pay, with steps of known times."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from k2cli.rank.engine.draft_index import LONGEST_MATCH, SHORTEST_MATCH, DraftIndex, Match
from k2cli.rank.engine.speculation import Speculation


def _by_comparing(tokens: list[int]) -> Match | None:
    """The longest match, the latest of several, found by comparing everything."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        tail = tokens[-length:]
        for follows in range(len(tokens) - 1, length - 1, -1):
            if tokens[follows - length : follows] == tail:
                return Match(follows, length)
    return None


def test_matches_are_those_of_comparing_everything() -> None:
    choose = random.Random(4)
    found = 0
    for _ in range(400):
        tokens = choose.choices([7, 99_999, 5, 2**20, 0, 12, 13, 14], k=choose.randint(1, 70))
        index = DraftIndex(tokens[:9])
        index.extend(tokens[9:])
        assert index.find() == _by_comparing(tokens), tokens
        found += index.find() is not None
    assert 100 < found < 400


def test_a_draft_goes_on_where_the_text_ends() -> None:
    index = DraftIndex([1, 2, 3, 1, 2])
    match = index.find()
    assert match == Match(follows=2, length=2)
    assert index.draft(match, 7) == [3, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("text", ["same", "alternating"])
def test_no_text_makes_looking_up_slow(text: str) -> None:
    """Every step looks once, so it must not depend on the length of a context."""
    tokens = [5] * 20_000 if text == "same" else [5, 6] * 10_000
    short, long = DraftIndex(tokens[:100]), DraftIndex(tokens)

    def work(index: DraftIndex) -> int:
        compared = 0
        original = index._common

        def counting(one: int, other: int) -> int:
            nonlocal compared
            compared += 1
            return original(one, other)

        index._common = counting  # type: ignore[method-assign]
        index.find()
        return compared

    assert work(long) == work(short)


def _run(
    steps: int,
    token_at: Callable[[int], int],
    cost: Callable[[int], float],
    *,
    noise: float = 0.0,
) -> tuple[float, int]:
    """Decode with simulated times; return the speed relative to no drafts, and the drafts."""
    speculation, choose = Speculation(), random.Random(1)
    row = speculation.open([token_at(0)])
    seconds, tokens, drafted_steps = 0.0, 1, 0
    while tokens < steps:
        drafts = speculation.drafts(row, steps)
        took = cost(len(drafts)) * (1 + noise * choose.random())
        seconds += took
        right = 0
        while right < len(drafts) and drafts[right] == token_at(tokens + right):
            right += 1
        row.index.extend(token_at(tokens + number) for number in range(right + 1))
        tokens += right + 1
        if drafts:
            drafted_steps += 1
            speculation.verified(row, len(drafts), right, right + 1, took)
        else:
            speculation.decoded(row, took, usual=True)
    return tokens * cost(0) * (1 + noise / 2) / seconds, drafted_steps


def _memory_bound(drafts: int) -> float:
    return 1 + 0.03 * drafts


def _like_separate_steps(drafts: int) -> float:
    return 1.0 + drafts


def _text(seed: int, kinds: int) -> Callable[[int], int]:
    tokens = random.Random(seed).choices(range(kinds), k=20_000)
    return tokens.__getitem__


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_text_whose_drafts_are_wrong_loses_little(noise: float) -> None:
    # Of 30 kinds of tokens every pair has occurred after a while, and predicts nothing.
    speed, drafts = _run(2000, _text(3, 30), lambda k: 1 + 0.3 * k, noise=noise)
    assert speed > 0.975
    assert 0 < drafts < 100


def test_steps_that_are_no_faster_are_not_taken() -> None:
    """MLX's CPU computes quantized weights token by token: the best draft gains nothing."""
    speed, drafts = _run(2000, lambda position: position % 50, _like_separate_steps)
    assert speed > 0.975
    assert 0 < drafts < 60


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_copy_is_fast_also_after_long_new_text(noise: float) -> None:
    alone, _ = _run(1000, lambda position: position % 100, _memory_bound, noise=noise)
    assert alone > 4
    new, period = _text(5, 30), 100

    def then_copies(position: int) -> int:
        return new(position) if position < 1000 else 1000 + position % period

    speed, _ = _run(2000, then_copies, _memory_bound, noise=noise)
    # 1,000 tokens of new text, 100 that are copied, and 900 copies of them.
    assert speed > 1.4
