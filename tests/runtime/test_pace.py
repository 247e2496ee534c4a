"""How small a prompt chunk is worth computing, from chunks that were seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from k2cli.runtime.pace import ASSUMED_TOKENS, LEAST_TOKENS, PrefillPace


def _paced(*chunks: tuple[int, float]) -> PrefillPace:
    pace = PrefillPace()
    for tokens, seconds in chunks:
        pace.observe(tokens, seconds)
    return pace


def test_nothing_is_concluded_from_one_size_or_from_first_chunks() -> None:
    assert _paced().least_tokens == ASSUMED_TOKENS
    assert _paced(*[(32, 0.32)] * 9).least_tokens == ASSUMED_TOKENS
    assert _paced((32, 0.32), (256, 2.56)).least_tokens == ASSUMED_TOKENS


def test_small_chunks_where_every_token_costs_the_same() -> None:
    seen = [(15, 0.15), (32, 0.32), (256, 2.56)]
    assert _paced(*seen, *seen).least_tokens == LEAST_TOKENS


def test_large_chunks_where_reading_the_weights_takes_most() -> None:
    # 0.3 s to read, and 1 ms a token: 256 tokens cost 2.2 ms each, 64 cost 5.7 ms.
    seen = [(tokens, 0.3 + tokens * 0.001) for tokens in (32, 64, 128, 256, 512, 1024)]
    assert _paced(*seen, *seen).least_tokens == ASSUMED_TOKENS


def test_a_disturbed_chunk_changes_nothing() -> None:
    seen = [(32, 0.32), (256, 2.56)]
    assert _paced(*seen, *seen, (32, 9.0), (256, 30.0)).least_tokens == LEAST_TOKENS
    # Nor does a first chunk, for which kernels were compiled.
    assert _paced((32, 90.0), (32, 0.32), (256, 2.56), (256, 2.56)).least_tokens == LEAST_TOKENS


@given(st.lists(st.tuples(st.integers(1, 8192), st.floats(0, 100)), max_size=40))
def test_always_within_its_bounds(chunks: list[tuple[int, float]]) -> None:
    assert LEAST_TOKENS <= _paced(*chunks).least_tokens <= ASSUMED_TOKENS
