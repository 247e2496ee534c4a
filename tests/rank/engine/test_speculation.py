"""Speculation on real ranks: the same answers as without, whatever is accepted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.protocol import Sampling
from tests.support.rank_pool import Outcome, RankPool, assignments, running

pytestmark = pytest.mark.ranks

# Strategy, ranks, and whether steps are built ahead.
PLACEMENTS = [("single", 1, True), ("pipeline", 2, True), ("tensor", 2, False), ("tensor", 2, True)]
# No step is built ahead of one with drafts. Where most steps have drafts, tensor slices that
# look ahead take the same way as those that do not, and twice the time: for scripts/soak.
FEWER = [*PLACEMENTS[:3], pytest.param(PLACEMENTS[3], marks=pytest.mark.soak)]
on_fewer_placements = pytest.mark.parametrize(
    "pool", FEWER, indirect=True, scope="module", ids=lambda p: "-".join(map(str, p))
)

# The toy repeats nothing by itself. Where few tokens have a chance, what follows a pair is often
# what followed it before.
TWO = {320: 200.0, 321: 200.0}
FOUR = {token: 200.0 for token in range(320, 324)}
ONE = {320: 200.0}
TOKENS = 70


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(300, 330), k=length)


PROMPT = _prompt(40, 3)


@pytest.fixture(scope="module", params=PLACEMENTS, ids=lambda p: "-".join(map(str, p)))
def pool(
    request: pytest.FixtureRequest, toy_k2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RankPool]:
    strategy, size, ahead = request.param
    parts = assignments(
        toy_k2, strategy, size, concurrency=2, context_length=512, looks_ahead=ahead,
        speculation="always",
    )  # fmt: skip
    with running(RankPool(parts, tmp_path_factory.mktemp("pool"))) as started:
        yield started


def _alone(pool: RankPool, tokens: int, use_speculation: bool, **options: object) -> Outcome:
    return pool.outcome(
        pool.submit(
            PROMPT, tokens, use_prefix_cache=False, use_speculation=use_speculation, **options
        )
    )


def _both(pool: RankPool, tokens: int = TOKENS, **options: object) -> tuple[Outcome, Outcome]:
    """Answer a request without speculation and with it."""
    return _alone(pool, tokens, False, **options), _alone(pool, tokens, True, **options)


def test_sampled_answers_are_token_for_token_those_without(pool: RankPool) -> None:
    """The random key of a token does not depend on drafts, so neither does the distribution."""
    drafts = accepted = 0
    for number, bias in enumerate((TWO, FOUR)):
        sampling = Sampling(
            temperature=1.0, top_p=0.95, seed=number, logit_bias=bias, top_logprobs=2
        )
        without, answer = _both(pool, sampling=sampling)
        assert answer.tokens == without.tokens
        assert len(answer.logprobs) == TOKENS
        for one, other in zip(answer.logprobs, without.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=2e-3)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert without.finished is not None
        assert answer.finished is not None
        assert without.finished.draft_tokens == 0
        drafts += answer.finished.draft_tokens
        accepted += answer.finished.accepted_tokens
    assert 0 < accepted < drafts


@on_fewer_placements
def test_a_greedy_loop_is_accepted_whole(pool: RankPool) -> None:
    without, answer = _both(pool, sampling=Sampling(logit_bias=ONE))
    assert answer.tokens == without.tokens
    assert answer.finished is not None
    # All but the first three tokens, and one of the leader's own for each draft.
    assert answer.finished.accepted_tokens > TOKENS // 2
    assert answer.finished.accepted_tokens == answer.finished.draft_tokens


@on_fewer_placements
def test_stop_tokens_and_limits_inside_drafts(pool: RankPool) -> None:
    """A draft that is right may go on past the end of an answer; nothing of it may be sent."""
    sampling = Sampling(temperature=1.0, seed=3, logit_bias=TWO | {322: 198.0})
    whole = _alone(pool, TOKENS, False, sampling=sampling)
    stop = whole.tokens[40]
    until_stop = whole.tokens[: whole.tokens.index(stop)]
    for tokens, stops, expected, reason in [
        *((count, [], whole.tokens[:count], "length") for count in (1, 2, 9, 30)),
        (TOKENS, [stop], until_stop, "stop"),
    ]:
        answer = _alone(pool, tokens, True, sampling=sampling, stop_tokens=stops)
        assert answer.tokens == expected
        assert answer.finished is not None
        assert answer.finished.reason == reason
        assert answer.finished.completion_tokens == len(answer.tokens)
        assert answer.finished.accepted_tokens <= len(answer.tokens)


@on_fewer_placements
def test_a_cache_that_was_cut_back_serves_the_next_request(pool: RankPool) -> None:
    """The kept prefix has what was answered and none of the wrong drafts."""
    sampling = Sampling(temperature=1.0, seed=8, logit_bias=FOUR)
    name = pool.submit(PROMPT, TOKENS, sampling, prefix_scope="kept")
    first = pool.outcome(name)
    assert first.finished is not None
    assert first.finished.accepted_tokens < first.finished.draft_tokens
    longer = [*PROMPT, *first.tokens, 500, 501]
    again = pool.outcome(pool.submit(longer, 12, prefix_scope="kept"))
    fresh = pool.outcome(pool.submit(longer, 12, use_prefix_cache=False, use_speculation=False))
    assert again.finished is not None
    assert again.finished.cached_tokens >= len(PROMPT) + TOKENS - 1
    assert again.tokens == fresh.tokens


def test_a_request_beside_others_that_come_and_go(pool: RankPool) -> None:
    """A row that is joined by another stops drafting, and goes on afterwards."""
    sampling = Sampling(temperature=1.0, seed=4, logit_bias=TWO)
    without = _alone(pool, TOKENS, False, sampling=sampling)
    name = pool.submit(PROMPT, TOKENS, sampling, use_prefix_cache=False)
    for number in range(6):
        other = pool.submit(_prompt(20, number), 4, Sampling(logit_bias=ONE))
        if number % 2:
            pool.cancel(other)
        pool.outcome(other)
    assert pool.outcome(name).tokens == without.tokens


def test_several_answers_to_one_prompt_are_those_of_single_requests(pool: RankPool) -> None:
    """In place of n=3: one request, and then others of the same prompt at the same time."""
    prompt = _prompt(300, 9)
    samplings = [
        Sampling(logit_bias=TWO),
        *(Sampling(temperature=1.0, seed=seed, logit_bias=FOUR) for seed in (1, 2)),
    ]
    single = [
        pool.outcome(
            pool.submit(prompt, 30, each, use_prefix_cache=False, use_speculation=False)
        ).tokens
        for each in samplings
    ]

    def answers(wanted: list[Sampling], scope: str) -> tuple[list[list[int]], list[int]]:
        names = [pool.submit(prompt, 30, each, prefix_scope=scope) for each in wanted]
        found = [pool.outcome(name) for name in names]
        for outcome in found:
            assert outcome.finished is not None
            assert outcome.finished.prompt_tokens == len(prompt)
            assert outcome.finished.completion_tokens == len(outcome.tokens) == 30
            assert outcome.finished.accepted_tokens <= outcome.finished.draft_tokens
        cached = [each.finished.cached_tokens for each in found if each.finished is not None]
        return [each.tokens for each in found], cached

    # The prompt is computed once; its last token is always computed, for the logits after it.
    assert answers(samplings[:1], "one first") == (single[:1], [0])
    assert answers(samplings[1:], "one first") == (single[1:], [len(prompt) - 1] * 2)
    greedy, cached = answers(samplings[:1] * 3, "one first")
    assert greedy == single[:1] * 3
    assert cached == [len(prompt) - 1] * 3
    # All at once: there is room for two. The second may come too late to wait for the first, and
    # compute it, too. The third starts once one of them is complete.
    tokens, cached = answers(samplings, "at once")
    assert tokens == single
    assert (cached[0], cached[2]) == (0, len(prompt) - 1)
