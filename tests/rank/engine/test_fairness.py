"""Fair order and pauses on real ranks: the same tokens, and nobody waits for a long answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.protocol import Sampling, WaitingOrder
from tests.support.rank_pool import RankPool, assignments, running

pytestmark = pytest.mark.ranks

CONTEXT = 512
ANSWER = 100


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(300, 900), k=length)


@pytest.fixture(
    scope="module",
    params=[("single", 1), ("pipeline", 2), ("tensor", 2)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def pool(
    request: pytest.FixtureRequest, toy_k2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RankPool]:
    """Ranks with room for one whole context."""
    strategy, size = request.param
    parts = assignments(toy_k2, strategy, size, concurrency=1, context_length=CONTEXT)
    with running(RankPool(parts, tmp_path_factory.mktemp("pool"))) as started:
        yield started


def _begin(pool: RankPool, prompt: list[int], owner: str, **options: object) -> str:
    """Submit a request that takes all memory, and wait for its first token."""
    name = pool.submit(prompt, CONTEXT, owner=owner, prefix_scope=owner, **options)  # type: ignore[arg-type]
    while name not in pool.outcomes or not pool.outcomes[name].tokens:
        pool.take()
    return name


def test_a_short_request_passes_an_answer_that_goes_on_as_if_nothing_had_been(
    pool: RankPool,
) -> None:
    """Also with random choices and penalties, whose state must survive the pauses."""
    sampling = Sampling(temperature=0.8, seed=11, presence_penalty=0.5, top_logprobs=0)
    long, short = _prompt(60, 1), [_prompt(20, 100 + index) for index in range(2)]
    alone = pool.generate(long, ANSWER, sampling=sampling, use_prefix_cache=False)
    one_by_one = [pool.generate(prompt, 2, use_prefix_cache=False) for prompt in short]
    name = _begin(pool, long, "a", sampling=sampling, use_prefix_cache=False)
    for index, prompt in enumerate(short):
        owner = "ab"[index % 2]  # of the same key and of another
        guest = pool.outcome(pool.submit(prompt, 2, owner=owner, use_prefix_cache=False))
        assert guest.tokens == one_by_one[index]
    assert pool.outcomes[name].finished is None
    while len(pool.outcomes[name].tokens) < ANSWER:
        pool.take()
    pool.cancel(name)
    outcome = pool.outcome(name)
    assert outcome.finished is not None
    assert outcome.finished.pauses >= 1
    assert outcome.finished.paused_seconds > 0
    assert outcome.tokens[:ANSWER] == alone


@pytest.mark.parametrize("pool", [("pipeline", 2)], indirect=True, ids=["pipeline-2"])
def test_keys_take_turns_with_one_place_and_paused_requests_can_be_cancelled(
    pool: RankPool,
) -> None:
    tokens = 262
    prompts = {owner: _prompt(30, ord(owner)) for owner in "ab"}
    names = {
        owner: pool.submit(prompt, tokens, owner=owner, use_prefix_cache=False)
        for owner, prompt in prompts.items()
    }
    while not all(name in pool.outcomes and pool.outcomes[name].tokens for name in names.values()):
        pool.take()
    # Both have begun, so one of them is paused.
    pool.cancel(names["b"])
    expected = pool.generate(prompts["a"], tokens, use_prefix_cache=False)
    for owner, name in names.items():
        outcome = pool.outcome(name)
        assert outcome.finished is not None
        assert outcome.finished.reason == ("cancelled" if owner == "b" else "length")
    assert pool.outcomes[names["a"]].tokens == expected


@pytest.mark.parametrize("pool", [("single", 1)], indirect=True, ids=["single-1"])
def test_a_short_prompt_passes_long_ones_and_the_order_is_told(pool: RankPool) -> None:
    first, *others = [
        pool.submit(_prompt(300, 20 + n), 3, use_prefix_cache=False) for n in range(3)
    ]
    passing = pool.submit(_prompt(12, 8), 1, use_prefix_cache=False)
    assert pool.outcome(passing).finished is not None
    ended = [n for n in (first, *others) if n in pool.outcomes and pool.outcomes[n].finished]
    assert len(ended) <= 1
    for name in (first, *others):
        assert pool.outcome(name).finished is not None
    orders = [m.request_ids for m in pool.ranks[0].seen if isinstance(m, WaitingOrder)]
    assert all(len(order) == len(set(order)) for order in orders)
    assert any(set(order) & set(others) for order in orders)


def test_requests_of_two_batches_are_paused_together(toy_k2: Path, tmp_path: Path) -> None:
    """One of each batch must go, and one of the batches always has a step in flight."""
    parts = assignments(toy_k2, "pipeline", 2, concurrency=2, context_length=CONTEXT)
    with running(RankPool(parts, tmp_path)) as pool:
        lengths = (20, 25, 40, 45)
        many = [
            pool.submit(_prompt(length, length), 200, owner="a", use_prefix_cache=False)
            for length in lengths
        ]
        while not all(name in pool.outcomes and pool.outcomes[name].tokens for name in many):
            pool.take()
        one = pool.submit(_prompt(300, 3), 100, owner="b", use_prefix_cache=False)
        while one not in pool.outcomes or not pool.outcomes[one].tokens:
            pool.take()
        assert not any(pool.outcomes[name].finished for name in many)
