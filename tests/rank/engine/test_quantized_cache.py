"""Ranks with quantized KV caches: two give what one gives, together and with reused prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from tests.quantization import originals
from tests.support.rank_pool import RankPool, assignments, running

pytestmark = pytest.mark.ranks

PROMPTS = [[(11 * seed + 7 * at) % 319 + 1 for at in range(40 * seed + 3)] for seed in range(4)]
# Two layers, keys and values of two heads of 32 bytes with a scale and a bias in float32.
TOKEN_BYTES = 2 * 2 * 2 * (32 + 8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return originals.llama(tmp_path_factory.mktemp("llama") / "original", mx.float32)


def pool_of(llama: Path, folder: Path, strategy: str, size: int, kv_bits: int = 8) -> RankPool:
    held = 512 * 4 * TOKEN_BYTES // size
    parts = assignments(
        llama, strategy, size, concurrency=4, context_length=512, kv_bits=kv_bits,
        expected_cache_bytes=[held] * size,
    )  # fmt: skip
    return RankPool(parts, folder)


@pytest.fixture(scope="module")
def alone(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[int]]]:
    """Answers of one rank to each prompt, alone and without reuse."""
    with running(pool_of(llama, tmp_path_factory.mktemp("alone"), "single", 1)) as pool:
        yield [pool.generate(prompt, 20, use_prefix_cache=False) for prompt in PROMPTS]


@pytest.mark.parametrize("strategy", ["tensor", "pipeline"])
def test_two_ranks_give_what_one_gives(
    llama: Path, alone: list[list[int]], tmp_path: Path, strategy: str
) -> None:
    with running(pool_of(llama, tmp_path, strategy, 2)) as pool:
        names = [pool.submit(prompt, 20) for prompt in PROMPTS]
        assert [pool.outcome(name).tokens for name in names] == alone
        again = pool.outcome(pool.submit(PROMPTS[3], 20))
        assert again.tokens == alone[3]
        assert again.finished is not None
        assert again.finished.cached_tokens == len(PROMPTS[3]) - 1
