"""Sizes of prompt chunks, from the times of earlier chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from k2cli.rank.engine.chunk_sizes import (
    ASSUMED_TOKENS,
    FIRST_CHUNK_TOKENS,
    LEAST_TOKENS,
    ChunkBounds,
    ChunkTimes,
)

PLAN_TOKENS = 2048
GPU = ChunkBounds(PLAN_TOKENS, layers=61, on_gpu=True)
CPU = ChunkBounds(PLAN_TOKENS, layers=61, on_gpu=False)


def _times_of(*chunks: tuple[int, float]) -> ChunkTimes:
    times = ChunkTimes()
    for tokens, seconds in chunks:
        times.observe(tokens, seconds)
    return times


def test_nothing_is_concluded_from_one_size_or_from_first_chunks() -> None:
    assert _times_of().least_tokens == ASSUMED_TOKENS
    assert _times_of(*[(32, 0.32)] * 9).least_tokens == ASSUMED_TOKENS
    assert _times_of((32, 0.32), (256, 2.56)).least_tokens == ASSUMED_TOKENS


def test_small_chunks_where_every_token_costs_the_same() -> None:
    seen = [(15, 0.15), (32, 0.32), (256, 2.56)]
    assert _times_of(*seen, *seen).least_tokens == LEAST_TOKENS


def test_large_chunks_where_reading_the_weights_takes_most() -> None:
    # 0.3 s to read, and 1 ms a token: 256 tokens cost 2.2 ms each, 64 cost 5.7 ms.
    seen = [(tokens, 0.3 + tokens * 0.001) for tokens in (32, 64, 128, 256, 512, 1024)]
    assert _times_of(*seen, *seen).least_tokens == ASSUMED_TOKENS


def test_a_disturbed_chunk_changes_nothing() -> None:
    seen = [(32, 0.32), (256, 2.56)]
    assert _times_of(*seen, *seen, (32, 9.0), (256, 30.0)).least_tokens == LEAST_TOKENS
    # Nor does a first chunk, for which kernels were compiled.
    assert _times_of((32, 90.0), (32, 0.32), (256, 2.56), (256, 2.56)).least_tokens == LEAST_TOKENS


@given(st.lists(st.tuples(st.integers(1, 8192), st.floats(0, 100)), max_size=40))
def test_always_within_its_bounds(chunks: list[tuple[int, float]]) -> None:
    assert LEAST_TOKENS <= _times_of(*chunks).least_tokens <= ASSUMED_TOKENS


def test_a_first_chunk_is_small_and_later_ones_follow_the_rate() -> None:
    assert GPU.alone(0.0, 0) == GPU.answering(0.0, 0) == GPU.together(0.0) == FIRST_CHUNK_TOKENS
    assert GPU.alone(100.0, 0) == 1000
    assert GPU.answering(100.0, 0) == 50
    assert GPU.together(100.0) == 250


def test_no_chunk_is_larger_than_the_memory_of_the_plan() -> None:
    small = ChunkBounds(48, layers=61, on_gpu=True)
    assert {small.alone(1e6, 0), small.answering(1e6, 0), small.together(1e6)} == {48}
    assert small.alone(100.0, 200_000) == small.answering(10.0, 200_000) == 48


def test_a_cpu_gains_nothing_from_large_chunks_of_a_short_context() -> None:
    assert GPU.alone(1000.0, 1024) == PLAN_TOKENS
    assert CPU.alone(1000.0, 1024) == 512
    assert CPU.alone(1000.0, 100_000) == PLAN_TOKENS


def test_few_layers_are_not_left_without_a_sign_of_life_for_long() -> None:
    few = ChunkBounds(PLAN_TOKENS, layers=2, on_gpu=True)
    assert few.alone(100.0, 0) == 200
    # The limit holds in a long context too: 2.5 s a layer at the measured rate.
    assert few.alone(10.0, 100_000) == 50


def test_chunks_do_not_shrink_away_as_the_context_grows() -> None:
    """Count K2's work in GFLOP, at 6,400 GFLOP/s: each chunk expands its whole context anew."""
    for choose in (GPU.alone, GPU.answering):
        rate, context = 0.0, 0
        while context < 100_000:
            tokens = choose(rate, context)
            expanding = 1.0 * context
            rest = tokens * (64 + 0.0025 * context)
            rate = tokens / ((expanding + rest) / 6400)
            context += tokens
            assert rest / (expanding + rest) > 0.3
        assert tokens > 400


def test_running_answers_are_held_up_longer_only_where_they_are_anyway() -> None:
    assert GPU.answering(200.0, 20_000) == 100
    assert GPU.answering(10.0, 20_000) == 20_000 // 128
    assert GPU.answering(10.0, 2_000) == LEAST_TOKENS


def test_a_prompt_is_cut_evenly_and_without_a_small_rest() -> None:
    assert GPU.share(2047, 256) == 256
    assert GPU.share(255, 245) == 255
    assert GPU.share(2047, 300) == 293
    assert GPU.share(10, 256) == 10
    # But never beyond the plan's memory.
    assert GPU.share(PLAN_TOKENS + 100, PLAN_TOKENS) == (PLAN_TOKENS + 100) // 2


@given(st.integers(1, 10**6), st.integers(1, 8192), st.integers(LEAST_TOKENS, 8192))
def test_a_share_is_never_larger_than_planned_nor_much_larger_than_wanted(
    left: int, wanted: int, most_tokens: int
) -> None:
    bounds = ChunkBounds(most_tokens, layers=1, on_gpu=False)
    share = bounds.share(left, min(wanted, most_tokens))
    assert 1 <= share <= min(left, most_tokens)
    assert share <= max(1.25 * wanted, 1) + 1


@given(
    st.integers(LEAST_TOKENS, 8192),
    st.integers(1, 100),
    st.booleans(),
    st.floats(0, 1e6),
    st.integers(0, 10**6),
)
def test_chunks_are_always_within_their_bounds(
    most_tokens: int, layers: int, on_gpu: bool, rate: float, context: int
) -> None:
    bounds = ChunkBounds(most_tokens, layers, on_gpu=on_gpu)
    chosen = (bounds.alone(rate, context), bounds.answering(rate, context), bounds.together(rate))
    assert all(LEAST_TOKENS <= tokens <= most_tokens for tokens in chosen)
