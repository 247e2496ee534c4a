"""Sharding of the head over tensor ranks, which mlx-lm replicates on all of them.

Each rank multiplies by its part of the vocabulary and the parts of the logits are gathered. For
K2 each of two ranks holds, and reads for every token, 330 MB less; the ranks exchange the logits
instead (655 kB a token in float32).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.sharding.stage import anatomy


class ShardedHead(nn.Module):
    """A linear head of which this rank holds ``vocabulary / size`` consecutive rows."""

    def __init__(self, head: nn.Module, group: Any) -> None:
        super().__init__()
        self._group = group
        wanted = ("group_size", "bits", "mode")
        self._settings = {name: vars(head)[name] for name in wanted if name in vars(head)}
        for name, value in head.parameters().items():
            rows = value.shape[0] // group.size()
            self[name] = mx.contiguous(value[group.rank() * rows : (group.rank() + 1) * rows])

    def __call__(self, hidden: mx.array) -> mx.array:
        """Compute logits ``[..., vocabulary]`` of hidden states ``[..., width]``, on every rank."""
        part = self._part(hidden)
        if "bias" in self:
            part = part + self["bias"]
        return gather_last_axis(part, self._group)

    def _part(self, hidden: mx.array) -> mx.array:
        if "scales" in self:
            return mx.quantized_matmul(
                hidden,
                self["weight"],
                scales=self["scales"],
                biases=self.get("biases"),
                transpose=True,
                **self._settings,
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
