"""k2's own latent attention gives what mlx-lm's class gives, whichever way a step is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.protocol import (
    CloseSequence,
    Decode,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    PrefillTogether,
)
from k2cli.rank.attention import latent
from k2cli.rank.attention.latent import use_own_attention
from k2cli.sharding.assemble import build, cast
from k2cli.sharding.latent_ways import LatentSettings, LatentWidths, is_absorbed
from k2cli.sharding.stage import make_cache
from tests.quantization.originals import LLAMA
from tests.support.latent_models import CONFIGS, MLX_LM, TOKENS, Requests, latent_model

WAYS = {
    "absorbed": LatentSettings(1.0),
    "blocks": LatentSettings(0.0, 16),
    "both": LatentSettings(1.0, 16),
    "one block": LatentSettings(0.0, 4096),
}
CLOSE = 2e-5
"""Largest difference of logits of about 3 in float32."""


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return latent_model("4 bit")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the way of each layer's step that mlx-lm's own code did not compute."""
    taken: list[str] = []
    original = latent._attend

    def attend(*arguments: Any, absorbed: bool) -> mx.array:
        taken.append("absorbed" if absorbed else "blocks")
        return original(*arguments, absorbed=absorbed)

    monkeypatch.setattr(latent, "_attend", attend)
    return taken


def _logits(model: nn.Module, settings: LatentSettings, chunks: Sequence[int]) -> mx.array:
    """Compute a prompt in chunks of these sizes."""
    assert use_own_attention(model, settings) == 2
    cache, done, found = make_cache(model), 0, []
    for count in chunks:
        found.append(model(mx.array([TOKENS[done : done + count]]), cache=cache))
        done += count
    return mx.concatenate(found, axis=1)


def _differ(left: mx.array, right: mx.array) -> float:
    return float(mx.abs(left.astype(mx.float32) - right.astype(mx.float32)).max().item())  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_and_way_gives_mlx_lms_logits(name: str, way: str, ways: list[str]) -> None:
    model = latent_model(name)
    chunks = [70, 9, 1, 40, 2]
    expected = _logits(model, MLX_LM, chunks)
    assert not ways
    found = _logits(model, WAYS[way], chunks)
    assert set(ways) == {"absorbed": {"absorbed"}, "both": {"absorbed", "blocks"}}.get(
        way, {"blocks"}
    )
    assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(expected, axis=-1))
    assert _differ(found, expected) < CLOSE


# Around the edges of blocks of 16, of their parts of 4, and of absorbed blocks of 64.
@pytest.mark.parametrize("held", [0, 1, 15, 16, 17, 64, 65, 128, 135])
@pytest.mark.parametrize("count", [2, 5, 16, 65])
def test_edges_of_blocks(small: nn.Module, held: int, count: int) -> None:
    chunks = [held, count] if held else [count]
    expected = _logits(small, MLX_LM, chunks)
    for settings in WAYS.values():
        assert _differ(_logits(small, settings, chunks), expected) < CLOSE, settings


def test_the_switch_is_where_operations_say(small: nn.Module, ways: list[str]) -> None:
    widths = LatentWidths(expanded=64, latent=64)
    most = max(count for count in range(1, 150) if is_absorbed(widths, 1.0, count, 100 + count))
    assert 30 < most < 64
    _logits(small, LatentSettings(1.0), [100, most])
    assert ways == ["absorbed"] * 2
    ways.clear()
    _logits(small, LatentSettings(1.0), [100, most + 1])
    assert not ways


def test_a_single_token_is_mlx_lms_own_step(small: nn.Module, ways: list[str]) -> None:
    _logits(small, WAYS["both"], [1] * 5)
    assert not ways


def test_k2_switches_at_about_170_queries() -> None:
    k2 = LatentWidths(expanded=256, latent=512)
    assert is_absorbed(k2, 1.0, 170, 131_072)
    assert not is_absorbed(k2, 1.0, 171, 131_072)
    assert not is_absorbed(k2, 1.0, 160, 160)  # a prompt without a context
    assert not is_absorbed(k2, 0.0, 2, 131_072)


def _batch(model: nn.Module, settings: LatentSettings) -> list[mx.array]:
    """Several prompts at once, a long one that joins them, a row that leaves, and a prefix."""
    run = Requests(model, settings)
    logits: list[mx.array | None] = []
    for sequence in (1, 2, 3):
        run.do(OpenSequence, sequence)
    run.do(PrefillTogether, 0, [1, 2, 3], [TOKENS[:5], TOKENS[3:40], TOKENS[:20]])
    logits.append(run.do(Decode, 0, [3, 4, 5]))
    run.do(OpenSequence, 4)
    for first in (0, 60, 90):
        run.do(Prefill, 4, TOKENS[first : first + (60 if first == 0 else 30)])
    run.do(JoinBatch, 0, 4)
    logits.append(run.do(Decode, 0, [6, 7, 8, 9]))
    # Tokens that were drafted, as speculation verifies them: several for each row of a batch.
    batch = run.executor.caches.batches[0]
    drafted = mx.array([TOKENS[:3], TOKENS[3:6], TOKENS[6:9], TOKENS[9:12]])
    logits.append(run.executor.stage.forward(drafted, batch.caches)[:, -1])
    run.do(LeaveBatch, 0, 4, keep_as=1)
    logits.append(run.do(Decode, 0, [1, 2, 3]))
    run.do(OpenSequence, 5, prefix=1, kept_tokens=100)
    run.do(Prefill, 5, TOKENS[100:125])
    run.do(JoinBatch, 1, 5)
    logits.append(run.do(Decode, 1, [4]))
    run.do(OpenSequence, 6)
    run.do(CloseSequence, 6)
    return [each for each in logits if each is not None]


@pytest.mark.parametrize("way", WAYS)
def test_batches_several_prompts_and_prefixes(small: nn.Module, way: str, ways: list[str]) -> None:
    expected = _batch(small, MLX_LM)
    for found, wanted in zip(_batch(small, WAYS[way]), expected, strict=True):
        assert found.shape == wanted.shape
        assert _differ(found, wanted) < CLOSE
    assert ("absorbed" in ways) == (WAYS[way].expansion_weight > 0)
    assert ("blocks" in ways) == (WAYS[way].block_tokens > 0)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_as_near_to_float32_as_mlx_lms_class(way: str) -> None:
    model = latent_model("4 bit")
    chunks = [70, 9, 40, 2]
    exact = _logits(model, MLX_LM, chunks)
    cast(model, mx.bfloat16)

    def error(settings: LatentSettings) -> float:
        found = _logits(model, settings, chunks).astype(mx.float32)
        return float(mx.sqrt(mx.mean(mx.square(found - exact))).item())  # type: ignore[arg-type]

    assert error(WAYS[way]) < 1.1 * error(MLX_LM)


def test_other_models_stay_as_they_are() -> None:
    assert use_own_attention(build(LLAMA), WAYS["both"]) == 0
