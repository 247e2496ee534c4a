"""The cost of a token: bytes to read and operations, per layer, from the traced model.

Traced and exact are the parameters that a step reads (of a mixture of experts only the chosen
ones), the size of the cache at a context, and the collectives of a slice. The operations of
attention follow from the widths in the config, as mlx-lm computes them: latent attention (MLA)
expands keys and values from the whole context for every chunk of a prompt, and stays in the latent
space for a single token. k2's own attention stays there for chunks of few tokens, too
(``sharding.latent_ways``). Blocks of the context have the same operations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from k2cli.planning.config_check import first_field, text_config
from k2cli.planning.memory.prefill import ActivationShape, activation_shape
from k2cli.sharding.latent_ways import (
    EXPANSION_WEIGHTS,
    LatentWidths,
    expansion_weight,
    is_absorbed,
)

if TYPE_CHECKING:
    from k2cli.choices import HeadPlacement
    from k2cli.sharding.token_cost import ModelTokenCost, TokenCost
    from k2cli.sharding.trace import StoredShapes


@dataclass(frozen=True, slots=True)
class CacheWork:
    """Cache bytes that one token reads per token of context, at most ``window_tokens`` of them.

    ``loads`` is the number of query heads that share a head of keys and values: MLX's kernel for
    a single query (``sdpa_vector``) loads every byte once for each of them. 0 for latent attention,
    which is computed with matrices.
    """

    bytes_per_token: int
    window_tokens: int | None
    loads: int = 0

    def read_bytes(self, context_length: int) -> int:
        """Return the bytes read for one token after ``context_length`` others."""
        seen = context_length if self.window_tokens is None else self.window_tokens
        return self.bytes_per_token * min(seen, context_length)


@dataclass(frozen=True, slots=True)
class LatentChoice:
    """The arguments of ``sharding.latent_ways.is_absorbed`` that do not depend on the step."""

    widths: LatentWidths
    expansion_weight: float


@dataclass(frozen=True, slots=True)
class LayerWork:
    """The cost of one layer, or of norm and head together, on one rank.

    ``dense_bytes`` are read in every step whatever the tokens; of ``expert_bytes`` the share of
    the experts that a step's tokens choose. Operations count two for each weight that a token is
    multiplied with: ``dense_flops`` and ``expert_flops`` per token. Attention: ``pair_flops`` per
    token of a prompt and token that it sees, ``decode_pair_flops`` the same in decode, and
    ``expand_flops`` per token of context for every chunk of a prompt. ``window_tokens`` limits
    the tokens that a token of a prompt sees; None is no limit. ``latent`` is set where k2's own
    latent attention chooses between the two: an absorbed chunk costs ``decode_pair_flops``, and
    nothing is expanded.
    """

    dense_bytes: int
    expert_bytes: int = 0
    experts: int = 0
    experts_per_token: int = 0
    dense_flops: int = 0
    expert_flops: int = 0
    pair_flops: int = 0
    decode_pair_flops: int = 0
    expand_flops: int = 0
    cache: tuple[CacheWork, ...] = ()
    state_bytes: int = 0
    window_tokens: int | None = None
    latent: LatentChoice | None = None

    def is_absorbed(self, chunk_tokens: int, done_tokens: int) -> bool:
        """True if a chunk of a prompt after ``done_tokens`` is computed in the latent space."""
        return self.latent is not None and is_absorbed(
            self.latent.widths,
            self.latent.expansion_weight,
            chunk_tokens,
            done_tokens + chunk_tokens,
        )

    def first_absorbed(self, chunk_tokens: int, count: int) -> int:
        """Return the number of the first of ``count`` equal chunks that is absorbed, or ``count``.

        All later ones are absorbed as well.
        """
        return bisect_left(
            range(count),
            True,
            key=lambda number: self.is_absorbed(chunk_tokens, number * chunk_tokens),
        )

    def weights_read(self, tokens: int) -> float:
        """Return the bytes of weights that a step reads: dense ones and chosen experts.

        Experts are taken to be chosen independently and evenly.
        """
        if not self.experts:
            return float(self.dense_bytes + self.expert_bytes)
        untouched = (1 - self.experts_per_token / self.experts) ** tokens
        return self.dense_bytes + self.expert_bytes * (1 - untouched)

    def cache_read(self, context_length: int) -> int:
        """Return the bytes of cache and state read for a token after ``context_length`` others."""
        return self.state_bytes + sum(part.read_bytes(context_length) for part in self.cache)

    def attention_flops(self, context_length: int, *, loads_known: bool) -> int:
        """Return the operations of one token's attention that no other term accounts for.

        Where the rate of the loads is known, it is that of the whole kernel.
        """
        if loads_known and any(part.loads for part in self.cache):
            return 0
        windows = [part.window_tokens for part in self.cache if part.window_tokens is not None]
        return self.decode_pair_flops * min([context_length, *windows])

    def cache_seconds(
        self, context_length: int, read_bytes_per_second: float, load_bytes_per_second: float | None
    ) -> float:
        """Return the time of ``cache_read``: that of memory, or of the kernel's loads if longer."""
        if load_bytes_per_second is None:
            return self.cache_read(context_length) / read_bytes_per_second
        return self.state_bytes / read_bytes_per_second + sum(
            part.read_bytes(context_length)
            * max(1 / read_bytes_per_second, part.loads / load_bytes_per_second)
            for part in self.cache
        )


@dataclass(frozen=True, slots=True)
class ModelWork:
    """The work of a whole model, cut into ``slices`` tensor slices (1: not cut), on one rank.

    ``head`` is computed by the last stage once per sampled token: final norm and head.
    ``hidden_bytes`` is the size of one token's hidden state on its way to the next stage;
    ``collectives`` is the number of collectives in each token's pass.
    """

    layers: tuple[LayerWork, ...]
    head: LayerWork
    hidden_bytes: int
    collectives: int
    slices: int


def model_work(
    config: Mapping[str, Any],
    *,
    stored: StoredShapes | None = None,
    dtype: str = "checkpoint",
    slices: int = 1,
    head: HeadPlacement = "replicated",
) -> ModelWork:
    """Trace the cost of a token. K2 takes a few tenths of a second.

    Args:
        config: a checked config.
        stored: shapes from the checkpoint's headers, if there are any.
        dtype: of activations and cache; ``checkpoint`` keeps the stored float types.
        slices: ranks that share each layer (tensor parallelism).
        head: ``sharded`` if the head is cut too.

    Raises:
        UsageError: if the config does not give a model, or it cannot be cut like this.
    """
    from k2cli.sharding.tensor import StandInGroup, slice_model
    from k2cli.sharding.token_cost import model_token_cost
    from k2cli.sharding.trace import trace_model

    model = trace_model(config, stored, dtype)
    if slices > 1:
        slice_model(config, model, StandInGroup(0, slices), head)
    return work_of_cost(config, model_token_cost(model), slices)


def work_of_cost(config: Mapping[str, Any], cost: ModelTokenCost, slices: int = 1) -> ModelWork:
    """Add the operations of attention, which only the config tells, to what was traced."""
    attention = _attention(config, slices)
    head = cost.head
    return ModelWork(
        layers=tuple(_layer_work(layer, attention) for layer in cost.layers),
        head=LayerWork(head.dense_bytes, dense_flops=2 * head.dense_weights),
        hidden_bytes=cost.hidden_bytes,
        collectives=cost.collectives,
        slices=slices,
    )


def with_own_attention(work: ModelWork, config: Mapping[str, Any]) -> ModelWork:
    """Return the work of a model whose latent attention k2 computes itself.

    Published measurements, to which constants are fitted, are of mlx-lm's class.
    """
    shape = activation_shape(config)
    choice = LatentChoice(
        LatentWidths(shape.expanded_size, shape.latent_size), expansion_weight(EXPANSION_WEIGHTS)
    )
    layers = (replace(each, latent=choice) if each.expand_flops else each for each in work.layers)
    return replace(work, layers=tuple(layers))


@dataclass(frozen=True, slots=True)
class _Attention:
    pair_flops: int
    decode_pair_flops: int
    expand_flops: int
    chosen_tokens: int | None  # sparse attention: tokens that a token of an answer attends to
    heads: int  # query heads that share heads of keys and values; 0 for latent attention

    def loads(self, key_heads: int) -> int:
        """Return the query heads that share one head of keys and values."""
        return max(1, self.heads // key_heads) if self.heads else 0


def _attention(config: Mapping[str, Any], slices: int) -> _Attention:
    shape: ActivationShape = activation_shape(config)
    text = text_config(config)
    heads = ceil(shape.heads / slices)
    chosen = first_field(text, ("index_topk",))
    if not shape.latent_size:
        both = 4 * heads * shape.head_size  # scores and values, a multiplication and an addition
        return _Attention(both, both, 0, chosen, heads)
    latent = first_field(text, ("kv_lora_rank",)) or 0
    rope = first_field(text, ("qk_rope_head_dim",)) or 0
    return _Attention(
        2 * heads * (shape.expanded_size + rope),
        2 * heads * (2 * latent + rope),
        2 * heads * latent * shape.expanded_size,
        chosen,
        0,
    )


def _layer_work(layer: TokenCost, attention: _Attention) -> LayerWork:
    cache = tuple(
        CacheWork(part.bytes_per_token, part.window_tokens, attention.loads(part.heads))
        for part in layer.cache
    )
    if attention.chosen_tokens is not None and cache:
        # Sparse attention reads the tokens that the indexer chose; the indexer's keys are all read.
        cache = (replace(cache[0], window_tokens=attention.chosen_tokens), *cache[1:])
    attends = bool(layer.cache)
    per_expert = layer.expert_weights // max(layer.experts, 1)
    return LayerWork(
        dense_bytes=layer.dense_bytes,
        expert_bytes=layer.expert_bytes,
        experts=layer.experts,
        experts_per_token=layer.experts_per_token,
        dense_flops=2 * layer.dense_weights,
        expert_flops=2 * per_expert * layer.experts_per_token,
        pair_flops=attention.pair_flops if attends else 0,
        decode_pair_flops=attention.decode_pair_flops if attends else 0,
        expand_flops=attention.expand_flops if attends else 0,
        cache=cache,
        state_bytes=layer.state_bytes,
        window_tokens=layer.cache[0].window_tokens if layer.cache else None,
    )
