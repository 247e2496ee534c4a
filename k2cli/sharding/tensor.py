"""Tensor parallelism: every rank holds a slice of every layer, cut by the model's own ``shard``.

mlx-lm's ``shard`` methods divide head counts with ``//`` and would silently cut a model wrong if
they do not divide; so obstacles are looked for first, and reported with the numbers.

mlx-lm leaves the head whole on every rank. k2 can cut it as well: each rank multiplies by its part
of the vocabulary and the parts of the logits are gathered. For K2 each of two ranks holds, and
reads for every token, 330 MB less; the ranks exchange the logits instead (655 kB a token in
float32).
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
from k2cli.sharding.model_errors import explain_failure
from k2cli.sharding.stage import anatomy


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


_SETTINGS = ("group_size", "bits", "mode")
"""Attributes of a quantized linear layer that say how it is quantized."""


class ShardedHead(nn.Module):
    """A linear head of which this rank holds ``vocabulary / size`` consecutive rows."""

    def __init__(self, head: nn.Module, group: Any) -> None:
        super().__init__()
        self._group = group
        for name in _SETTINGS:
            if name in vars(head):
                setattr(self, name, vars(head)[name])
        for name, value in head.parameters().items():
            rows = value.shape[0] // group.size()
            self[name] = mx.contiguous(value[group.rank() * rows : (group.rank() + 1) * rows])

    def __call__(self, hidden: mx.array) -> mx.array:
        """Compute logits ``[..., vocabulary]`` of hidden states ``[..., width]``, on every rank."""
        part = self.product(hidden)
        if "bias" in self:
            part = part + self["bias"]
        return gather_last_axis(part, self._group)

    def product(self, hidden: mx.array) -> mx.array:
        """Multiply by this rank's rows alone."""
        if "scales" in self:
            return mx.quantized_matmul(
                hidden,
                self["weight"],
                scales=self["scales"],
                biases=self.get("biases"),
                transpose=True,
                **{name: vars(self)[name] for name in _SETTINGS if name in vars(self)},
            )
        weight: mx.array = self["weight"]
        return hidden @ weight.T


def gather_last_axis(part: mx.array, group: Any) -> mx.array:
    """Concatenate the last axis of every rank's part, in rank order."""
    size, width = group.size(), part.shape[-1]
    gathered = mx.distributed.all_gather(part.reshape(-1, width), group=group)
    by_row = gathered.reshape(size, -1, width).transpose(1, 0, 2)
    return by_row.reshape(*part.shape[:-1], size * width)


def _head_of(model: nn.Module) -> tuple[nn.Module, str] | None:
    """Return (parent, attribute) of the linear head; None if the embedding is the head."""
    parts = anatomy(model)
    linear = (nn.Linear, nn.QuantizedLinear)
    found = [(parent, name) for parent, name in parts.outputs if isinstance(parent[name], linear)]
    return found[-1] if len(found) == 1 else None


def can_shard_head(model: nn.Module, ranks: int) -> bool:
    """True if a model has a head of its own whose rows divide among the ranks."""
    place = _head_of(model)
    if place is None:
        return False
    parent, name = place
    return all(value.shape[0] % ranks == 0 for value in parent[name].parameters().values())


def shard_head(model: nn.Module, group: Any) -> None:
    """Cut the head to this rank's rows, in place and lazily.

    Raises:
        ValueError: if it cannot be cut; ask ``can_shard_head`` first.
    """
    place = _head_of(model)
    if place is None or not can_shard_head(model, group.size()):
        raise ValueError("the head cannot be cut into equal parts")
    parent, name = place
    parent[name] = ShardedHead(parent[name], group)
