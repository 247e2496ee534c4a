"""Quantized KV caches against mlx-lm's own, in batches, as prefixes, and in the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from k2cli.errors import UsageError
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.protocol import Decode, JoinBatch, LeaveBatch, OpenSequence, Prefill
from k2cli.rank.executor import Executor
from k2cli.rank.kv_cache.segments import fill, segment_of
from k2cli.sharding.assemble import build
from k2cli.sharding.kv_cache.attention import use_own_quantized_attention
from k2cli.sharding.kv_cache.quantized import QUANTIZED_QUERIES
from k2cli.sharding.stage import cut_stage, make_cache
from k2cli.sharding.weights_and_cache import kv_cache_bytes
from tests.planning.plans import make_plan
from tests.quantization.originals import KIMI, LLAMA
from tests.support.commands import k2

PROMPTS = [
    [(11 * seed + 7 * at) % 319 + 1 for at in range(length)]
    for seed, length in enumerate((70, 9, 300))
]
CHUNK = 40
LOGITS = {"abs": 1e-4, "rel": 1e-4}


@pytest.fixture(scope="module", autouse=True)
def mlx_lms_attention() -> Iterator[Any]:
    """Use k2's own attention in this module; return mlx-lm's."""
    base = mlx_lm_module("models.base")
    before = base.quantized_scaled_dot_product_attention
    use_own_quantized_attention()
    yield before
    base.quantized_scaled_dot_product_attention = before
    mx.clear_cache()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A llama whose logits differ clearly: weights of random signs and sizes."""
    mx.random.seed(5)
    made = build(LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64})
    made.update(
        tree_map(lambda w: 2.5 * mx.random.normal(w.shape) / w.shape[-1] ** 0.5, made.parameters())
    )
    mx.eval(made.parameters())
    return made


def logits_of(model: nn.Module, cache: list[Any], tokens: list[int]) -> mx.array:
    last: mx.array = model(mx.array([tokens]), cache=cache)[0, -1]
    mx.eval(last)
    return last


def answer(model: nn.Module, cache: list[Any], prompt: list[int], steps: int) -> list[mx.array]:
    """Return the logits of each step of a greedy answer."""
    for first in range(0, len(prompt), CHUNK):
        found = [logits_of(model, cache, prompt[first : first + CHUNK])]
    for _ in range(steps):
        found.append(logits_of(model, cache, [int(mx.argmax(found[-1]).item())]))
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_a_sequence_is_what_mlx_lms_own_quantized_cache_gives(
    model: nn.Module, bits: int, mlx_lms_attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = answer(model, make_cache(model, bits), PROMPTS[2], 20)
    kinds, base = mlx_lm_module("models.cache"), mlx_lm_module("models.base")
    plain = [kinds.KVCache().to_quantized(group_size=64, bits=bits) for _ in model.layers]
    monkeypatch.setattr(base, "quantized_scaled_dot_product_attention", mlx_lms_attention)
    theirs = answer(model, plain, PROMPTS[2], 20)
    for own, other in zip(ours, theirs, strict=True):
        assert own.tolist() == pytest.approx(other.tolist(), **LOGITS)
    unquantized = answer(model, make_cache(model), PROMPTS[2], 0)[0]
    assert mx.abs(unquantized - ours[0]).max().item() > 1e-3  # it was quantized at all


def test_a_batch_and_a_prefix_give_what_each_sequence_gives_alone(model: nn.Module) -> None:
    alone = [answer(model, make_cache(model, 8), prompt, 12) for prompt in PROMPTS]
    stage = cut_stage(model, 0, len(model.layers))
    stage.kv_bits = 8
    assert stage.can_batch
    assert stage.has_plain_caches
    executor, steps = Executor(stage, None), iter(range(1, 1000))
    for sequence, prompt in enumerate(PROMPTS):
        executor.carry_out(OpenSequence(next(steps), sequence))
        for first in range(0, len(prompt), CHUNK):
            executor.carry_out(Prefill(next(steps), sequence, prompt[first : first + CHUNK]))
        executor.carry_out(JoinBatch(next(steps), 0, sequence))
    rows = list(range(len(PROMPTS)))
    # One row leaves in the middle, another leaves its cache as a prefix.
    for step in range(12):
        if step == 4:
            executor.carry_out(LeaveBatch(next(steps), 0, 1))
            rows.remove(1)
        fed = [int(mx.argmax(alone[row][step]).item()) for row in rows]
        logits = executor.carry_out(Decode(next(steps), 0, fed)).logits
        for row, found in zip(rows, logits, strict=True):
            assert found.tolist() == pytest.approx(alone[row][step + 1].tolist(), **LOGITS)
    assert all(cache.stored_bits == 8 for cache in executor.caches.batches[0].caches)
    executor.carry_out(LeaveBatch(next(steps), 0, 2, keep_as=1))
    executor.carry_out(OpenSequence(next(steps), 9, 1, 150))
    for first in range(150, 300, CHUNK):
        executor.carry_out(Prefill(next(steps), 9, PROMPTS[2][first : min(first + CHUNK, 300)]))
    executor.carry_out(JoinBatch(next(steps), 5, 9))
    token = int(mx.argmax(alone[2][0]).item())
    logits = executor.carry_out(Decode(next(steps), 5, [token])).logits
    assert logits[0].tolist() == pytest.approx(alone[2][1].tolist(), **LOGITS)


def test_parts_of_a_cache_join_to_what_they_were_cut_from(model: nn.Module) -> None:
    whole = make_cache(model, 4)
    answer(model, whole, PROMPTS[0], 0)
    joined = make_cache(model, 4)
    for cache, empty in zip(whole, joined, strict=True):
        parts = [segment_of(cache, *part) for part in ((0, 30), (30, 31), (31, 70))]
        fill(empty, parts, 70)
    assert [cache.offset for cache in joined] == [70] * len(joined)
    found = [logits_of(model, cache, [5]).tolist() for cache in (whole, joined)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("bits", "bytes_per_head"), [(8, 64 + 4), (4, 32 + 4)])
def test_a_filled_cache_has_the_planned_bytes(
    tmp_path: Path, model: nn.Module, bits: int, bytes_per_head: int
) -> None:
    config = LLAMA | {"head_dim": 64, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    nodes = parse_hardware("2x m3-ultra-512")
    plans = {
        strategy: make_plan(
            str(tmp_path), nodes, strategy=strategy, context_length=500, kv_bits=bits
        )
        for strategy in ("pipeline", "tensor")
    }
    # Two layers, keys and values, two heads of 64 with a 16-bit scale and bias; 500 tokens take
    # two allocation steps. Ranks of tensor slices hold one of the heads of both layers.
    for plan in plans.values():
        assert plan.request.kv_bits == bits
        assert [node.kv_cache_bytes for node in plan.nodes] == [512 * 2 * 2 * bytes_per_head] * 2
    stage = cut_stage(build(config), 0, 2)
    stage.kv_bits = bits
    caches = stage.make_local_cache()
    for length in (300, QUANTIZED_QUERIES, 192):
        stage.forward(mx.ones((1, length), dtype=mx.int32), caches)
    assert kv_cache_bytes(stage, 500) == sum(cache.nbytes for cache in caches)


def test_latent_attention_is_refused_with_the_bytes_it_would_save(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KIMI | {"torch_dtype": "bfloat16"}))
    done = k2("plan-memory", str(tmp_path), "--hardware", "m3-ultra-512", "--kv-bits", "8",
              "--context", "512")  # fmt: skip
    assert done.returncode == 2
    # Three layers: a latent of 128 and a rotary key of 32, in groups of 32.
    held = 3 * (128 + 32) * 2
    after = 3 * (128 + 32) * (1 + 2 * 2 / 32)
    assert f"takes {held:,} bytes per token, and --kv-bits 8 would save {held - after:,.0f}" in (
        " ".join(done.stderr.split())
    )
    assert done.stdout == ""


def test_heads_without_whole_groups_are_refused(tmp_path: Path) -> None:
    config = LLAMA | {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="multiple of 32; those of this model have 24"):
        make_plan(str(tmp_path), parse_hardware("m3-ultra-512"), kv_bits=8)
