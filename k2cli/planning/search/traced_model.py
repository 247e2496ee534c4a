"""A model traced for planning: once whole, and once for each number of tensor slices.

All planning with a model of one float type shares a ``TracedModel``, so a plan with its advice,
limits and alternatives costs a few traces, not hundreds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from k2cli.choices import FloatType, Head, HeadPlacement, KvBits
from k2cli.errors import UsageError
from k2cli.planning.model import ModelToPlan
from k2cli.planning.speed.work import ModelWork, with_own_attention, work_of_cost

if TYPE_CHECKING:
    import mlx.nn as nn

    from k2cli.sharding.profile import Profile


@dataclass(frozen=True, slots=True)
class Slices:
    """The model cut into ``count`` tensor slices (1: whole), as each rank holds it.

    ``work`` is None if what a token costs could not be traced: then no speed is predicted.
    """

    count: int
    head: HeadPlacement
    profile: Profile
    work: ModelWork | None


class TracedModel:
    """A model in one float type; traces are kept.

    Args:
        model: the model to plan.
        dtype: float type of activations and cache.
        head: ``auto``, ``replicated`` or ``sharded``, for tensor slices.
        kv_bits: of quantized caches, 0 if they are not quantized.
    """

    def __init__(
        self, model: ModelToPlan, dtype: FloatType, head: Head = "auto", kv_bits: KvBits = 0
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.kv_bits = kv_bits
        self._head = head
        self._slices: dict[int, Slices | UsageError] = {}
        self._stages: dict[int, UsageError | None] = {}

    def slices(self, count: int) -> Slices:
        """Return the model in ``count`` tensor slices.

        Raises:
            UsageError: if it cannot be cut so, with the numbers.
        """
        if count not in self._slices:
            try:
                self._slices[count] = self._trace(count)
            except UsageError as error:
                self._slices[count] = error
        found = self._slices[count]
        if isinstance(found, UsageError):
            raise found
        return found

    def check_stages(self, first_layers: list[int]) -> None:
        """Check that the model can be cut before each of these layers.

        Raises:
            UsageError: if its layers exchange more than one array there.
        """
        from k2cli.sharding.stage import hidden_at

        for layer in first_layers:
            if layer not in self._stages:
                try:
                    hidden_at(self.model.facts.model, layer)
                    self._stages[layer] = None
                except UsageError as error:
                    self._stages[layer] = error
            if (obstacle := self._stages[layer]) is not None:
                raise obstacle

    def check_quantizable(self, tokens: int) -> None:
        """Check that KV caches can be quantized to ``kv_bits``, if they are to be.

        Args:
            tokens: of all sequences together.

        Raises:
            UsageError: with the reason.
        """
        if self.kv_bits:
            from k2cli.sharding.kv_cache.check import check_quantizable

            check_quantizable(self.model.config, self._whole(), self.kv_bits, tokens)

    def _whole(self) -> nn.Module:
        from k2cli.sharding.trace import trace_model

        source = self.model
        if _is_of(source.facts.model, self.dtype):
            return source.facts.model  # tracing it once more would give the same
        return trace_model(source.config, source.stored, self.dtype)

    def _trace(self, count: int) -> Slices:
        from k2cli.sharding.profile import profile_model
        from k2cli.sharding.tensor import StandInGroup, slice_model
        from k2cli.sharding.trace import running_model, trace_model

        source = self.model
        head = self._head_placement(count)
        if count == 1:
            model = self._whole()
        else:
            model = trace_model(source.config, source.stored, self.dtype)
            slice_model(source.config, model, StandInGroup(0, count), head)
        with running_model(source.config, "traced"):
            profile = profile_model(model, self.kv_bits)
            return Slices(count, head, profile, self._work(model, count))

    def _work(self, model: nn.Module, count: int) -> ModelWork | None:
        from k2cli.sharding.token_cost import model_token_cost

        try:
            cost = model_token_cost(model, self.kv_bits)
        except UsageError:
            return None
        work = work_of_cost(self.model.config, cost, count)
        own = self.model.shape.own_attention
        return with_own_attention(work, self.model.config) if own else work

    def _head_placement(self, count: int) -> HeadPlacement:
        """Cut the head too if possible: less to hold, and less to read for every token."""
        from k2cli.sharding.tensor import can_shard_head

        if count == 1 or self._head == "replicated":
            return "replicated"
        if can_shard_head(self.model.facts.model, count):
            return "sharded"
        if self._head == "sharded":
            raise UsageError(
                f"the head of {self.model.config['model_type']} cannot be cut into {count} "
                "equal parts",
                "--head replicated",
            )
        return "replicated"


def _is_of(model: nn.Module, dtype: str) -> bool:
    """True if casting the traced model to a float type would change nothing."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from k2cli.sharding.assemble import FLOAT_TYPES

    keep = getattr(model, "cast_predicate", None)
    return all(
        value.dtype == FLOAT_TYPES[dtype]
        or not mx.issubdtype(value.dtype, mx.floating)
        or (keep is not None and not keep(path))
        for path, value in tree_flatten(model.parameters())
    )
