"""The engine under concurrency: the same tokens as alone, on every placement."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.protocol import PromptProgress, Sampling
from tests.support.rank_pool import RankPool, assignments, running

pytestmark = pytest.mark.ranks

PLACEMENTS = [("single", 1), ("pipeline", 2), ("tensor", 2)]
LENGTHS = [1, 3, 40, 7, 90, 2, 33, 150]


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(300, 900), k=length)


PROMPTS = [_prompt(length, index) for index, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=PLACEMENTS, ids=lambda p: f"{p[0]}-{p[1]}")
def pool(
    request: pytest.FixtureRequest, toy_k2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RankPool]:
    strategy, size = request.param
    parts = assignments(toy_k2, strategy, size, concurrency=8, context_length=512)
    with running(RankPool(parts, tmp_path_factory.mktemp("pool"))) as started:
        yield started


@pytest.fixture(scope="module")
def alone(toy_k2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Answers to each prompt on one rank, alone and without reuse."""
    parts = assignments(toy_k2, "single", 1, concurrency=8, context_length=512)
    with running(RankPool(parts, tmp_path_factory.mktemp("alone"))) as started:
        return [started.generate(prompt, 24, use_prefix_cache=False) for prompt in PROMPTS]


def test_requests_together_give_what_each_gives_alone(
    pool: RankPool, alone: list[list[int]]
) -> None:
    names = [pool.submit(prompt, 24, use_prefix_cache=False) for prompt in PROMPTS]
    assert [pool.outcome(name).tokens for name in names] == alone


def test_requests_of_unequal_length_leave_the_others_alone(
    pool: RankPool, alone: list[list[int]]
) -> None:
    counts = [1, 24, 5, 17, 2, 9, 24, 3]
    names = [
        pool.submit(prompt, count, use_prefix_cache=False)
        for prompt, count in zip(PROMPTS, counts, strict=True)
    ]
    for name, count, expected in zip(names, counts, alone, strict=True):
        outcome = pool.outcome(name)
        assert outcome.tokens == expected[:count]
        assert outcome.finished is not None
        assert outcome.finished.reason == "length"


def test_cancelled_requests_leave_the_others_in_step(
    pool: RankPool, alone: list[list[int]]
) -> None:
    names = [pool.submit(prompt, 24, use_prefix_cache=False) for prompt in PROMPTS]
    # One in the queue or prefill at once, one after its first tokens, one in mid-prefill.
    pool.cancel(names[7])
    pool.cancel(names[1])
    while not (names[3] in pool.outcomes and len(pool.outcomes[names[3]].tokens) >= 2):
        pool.take()
    pool.cancel(names[3])
    for index, name in enumerate(names):
        outcome = pool.outcome(name)
        assert outcome.finished is not None
        if index in (1, 3, 7):
            assert outcome.finished.reason in ("cancelled", "length")
            assert outcome.tokens == alone[index][: len(outcome.tokens)]
        else:
            assert outcome.tokens == alone[index]


def test_a_stop_token_ends_a_request_and_is_not_returned(
    pool: RankPool, alone: list[list[int]]
) -> None:
    stop = alone[4][6]
    expected = list(itertools.takewhile(lambda token: token != stop, alone[4]))
    other = pool.submit(PROMPTS[2], 24, use_prefix_cache=False)
    outcome = pool.outcome(pool.submit(PROMPTS[4], 24, stop_tokens=[stop], use_prefix_cache=False))
    assert outcome.tokens == expected
    assert outcome.finished is not None
    assert outcome.finished.reason == "stop"
    assert outcome.finished.completion_tokens == len(expected)
    assert pool.outcome(other).tokens == alone[2]


def test_a_second_turn_reuses_the_first(pool: RankPool) -> None:
    first = _prompt(70, 70)
    answer = pool.generate(first, 12)
    second = [*first, *answer, *_prompt(9, 71)]
    fresh = pool.generate(second, 12, use_prefix_cache=False)
    outcome = pool.outcome(pool.submit(second, 12))
    assert outcome.tokens == fresh
    assert outcome.finished is not None
    # All tokens of the answer but the last have been computed; the last was never an input.
    assert outcome.finished.cached_tokens >= len(first) + len(answer) - 1
    # A shared beginning is enough.
    third = [*first[:50], *_prompt(20, 72)]
    assert (
        pool.generate(third, 12, use_prefix_cache=False)
        == (again := pool.outcome(pool.submit(third, 12))).tokens
    )
    assert again.finished is not None
    assert again.finished.cached_tokens == 50


def test_a_prefix_is_found_in_its_own_scope_only(pool: RankPool) -> None:
    """The time to the first token tells the owner of one key nothing about another's prompts."""
    prompt = _prompt(60, 80)

    def cached_tokens(scope: str) -> int:
        outcome = pool.outcome(pool.submit(prompt, 2, prefix_scope=scope))
        assert outcome.finished is not None
        return outcome.finished.cached_tokens

    assert [cached_tokens(scope) for scope in ("", "a", "b", "a", "b", "")] == [0, 0, 0, 59, 59, 59]


def test_the_cache_evicts_all_the_time_and_stays_right(pool: RankPool) -> None:
    """Run many conversations in turn, of more tokens together than the plan has room for."""
    # A cache grows in steps of 256 tokens, so 20 of them are more than the 4,096 of the plan.
    starts = [_prompt(12, 500 + index) for index in range(20)]
    fresh = [pool.submit(start, 4, use_prefix_cache=False) for start in starts]
    expected = [pool.outcome(name).tokens for name in fresh]
    for _ in range(2):
        names = [pool.submit(start, 4) for start in starts]
        assert [pool.outcome(name).tokens for name in names] == expected


def test_the_same_seed_gives_the_same_text_beside_other_requests(pool: RankPool) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=40, min_p=0.01, seed=7)
    alone = pool.generate(PROMPTS[2], 16, sampling=sampling, use_prefix_cache=False)
    names = [pool.submit(prompt, 16, use_prefix_cache=False) for prompt in PROMPTS[3:6]]
    assert pool.generate(PROMPTS[2], 16, sampling=sampling, use_prefix_cache=False) == alone
    other = Sampling(temperature=0.9, top_p=0.95, top_k=40, min_p=0.01, seed=8)
    assert pool.generate(PROMPTS[2], 16, sampling=other, use_prefix_cache=False) != alone
    for name in names:
        assert pool.outcome(name).finished is not None


def test_penalties_bias_and_logprobs_hold_for_one_row_alone(
    pool: RankPool, alone: list[list[int]]
) -> None:
    plain = pool.submit(PROMPTS[0], 24, use_prefix_cache=False)
    banned = alone[2][0]
    sampling = Sampling(logit_bias={banned: -100.0}, presence_penalty=2.0, top_logprobs=3)
    outcome = pool.outcome(pool.submit(PROMPTS[2], 8, sampling=sampling, use_prefix_cache=False))
    assert banned not in outcome.tokens
    assert len(outcome.logprobs) == 8
    for token, entry in zip(outcome.tokens, outcome.logprobs, strict=True):
        assert entry.top[0] == (token, entry.logprob)
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
        assert entry.logprob <= 0
    assert pool.outcome(plain).tokens == alone[0]


def test_what_cannot_run_is_refused_with_the_numbers(pool: RankPool) -> None:
    too_long = pool.outcome(pool.submit(_prompt(600, 1), 4))
    assert too_long.error == "the prompt has 600 tokens, the context holds 512"
    assert pool.outcome(pool.submit([], 4)).error is not None
    # The context bounds max_tokens; it is no reason to refuse.
    outcome = pool.outcome(pool.submit(_prompt(500, 2), 10_000))
    assert outcome.finished is not None
    assert len(outcome.tokens) == 12


def test_a_long_prompt_does_not_stall_running_answers(pool: RankPool) -> None:
    answering = pool.submit(PROMPTS[1], 60, use_prefix_cache=False)
    while not (answering in pool.outcomes and pool.outcomes[answering].tokens):
        pool.take()
    long = pool.submit(_prompt(480, 3), 4, use_prefix_cache=False)
    chunks = tokens_between = 0
    while long not in pool.outcomes:
        message = pool.take()
        if isinstance(message, PromptProgress) and message.request_id == long:
            chunks += 1
        elif chunks and pool.outcomes[answering].finished is None:
            tokens_between += 1
    assert chunks >= 480 // 32
    assert tokens_between >= chunks // 2
    pool.outcome(answering)
    pool.outcome(long)


def test_requests_of_one_prompt_at_the_same_time_give_what_each_gives_alone(
    pool: RankPool,
) -> None:
    """Those that come while it is computed wait for it: see ``test_request_table``."""
    shared = _prompt(300, 70)
    prompts = [shared, shared, [*shared, *_prompt(40, 71)], [*shared[:290], *_prompt(30, 72)]]
    apart = [pool.generate(prompt, 8, use_prefix_cache=False) for prompt in prompts]
    for scope in ("one", "two"):
        pool.submit(_prompt(480, 73), 1, use_prefix_cache=False)  # these arrive meanwhile
        names = [pool.submit(prompt, 8, prefix_scope=scope) for prompt in prompts]
        cached = []
        for name, prompt, tokens in zip(names, prompts, apart, strict=True):
            outcome = pool.outcome(name)
            assert outcome.tokens == tokens
            assert outcome.finished is not None
            assert outcome.finished.prompt_tokens == len(prompt)
            cached.append(outcome.finished.cached_tokens)
        assert all(count in (0, 290, 299, 300) for count in cached)
        assert 0 in cached
