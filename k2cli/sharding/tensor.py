"""Tensor parallelism: every rank holds a slice of every layer, cut by the model's own ``shard``.

mlx-lm's ``shard`` methods divide head counts with ``//`` and would silently cut a model wrong if
they do not divide; so obstacles are looked for first, and reported with the numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.choices import HeadPlacement
from k2cli.errors import UsageError
from k2cli.sharding.architectures import MODEL_FAILURES
from k2cli.sharding.head import can_shard_head, shard_head
from k2cli.sharding.model_errors import explain_failure


@dataclass(frozen=True, slots=True)
class StandInGroup:
    """Stand-in for an ``mx.distributed.Group`` while tracing: has a rank and a size only."""

    of_rank: int
    of_size: int

    def rank(self) -> int:
        return self.of_rank

    def size(self) -> int:
        return self.of_size


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def tensor_obstacle(config: Mapping[str, Any], model: nn.Module, ranks: int) -> str | None:
    """Return the reason why a model cannot be cut into ``ranks`` tensor slices; None if it can.

    ``model`` is the assembled model; it is not changed.
    """
    if ranks == 1:
        return None
    name = config.get("model_type")
    if not hasattr(model, "shard"):
        return f"mlx-lm has no tensor parallelism for {name}"
    text = _text(config)
    counts = {"attention heads": text.get("num_attention_heads")}
    if not text.get("kv_lora_rank"):  # MLA keeps one latent for all heads
        counts["key-value heads"] = text.get("num_key_value_heads")
    for what, count in counts.items():
        if isinstance(count, int) and count % ranks:
            return f"{name} has {count} {what}, which {ranks} ranks cannot share equally"
    return None


@contextlib.contextmanager
def _unevaluated() -> Iterator[None]:
    """Disable evaluation while slices are only traced.

    mlx-lm's muse_spark evaluates its experts when it is cut, which would load the whole model.
    """
    evaluate = mx.eval
    mx.eval = lambda *_: None
    try:
        yield
    finally:
        mx.eval = evaluate


def slice_model(
    config: Mapping[str, Any],
    model: nn.Module,
    group: Any,
    head: HeadPlacement = "replicated",
) -> None:
    """Cut the model, in place and lazily, to the slice of ``group.rank()``.

    Raises:
        UsageError: if the model cannot be cut into ``group.size()`` slices.
    """
    ranks = group.size()
    if ranks == 1:
        return
    obstacle = tensor_obstacle(config, model, ranks)
    if obstacle is None:
        try:
            with _unevaluated() if isinstance(group, StandInGroup) else contextlib.nullcontext():
                whole = head == "sharded" and can_shard_head(model, ranks)
                model.shard(group)
                # Some models, such as Qwen3.5, cut their head themselves.
                if head == "sharded" and (can_shard_head(model, ranks) or not whole):
                    shard_head(model, group)
            return
        except MODEL_FAILURES as error:
            # mx.split: a dimension, or its number of quantization groups, does not divide; or the
            # model lacks a part that its own ``shard`` expects.
            reason = explain_failure(error, config)
            obstacle = f"{config.get('model_type')} cannot be cut into {ranks} slices: {reason}"
    raise UsageError(f"tensor parallelism is not possible: {obstacle}", "--parallel pipeline")
