"""What a token costs to compute: bytes to read and operations, per layer, from the traced model.

Exact where the trace knows: which parameters a step reads (of a mixture of experts the chosen
ones only) and what the cache holds at a context. Pure values; nothing is evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one layer, or the embedding and head, costs on one rank.

    ``dense_bytes`` are read in every step whatever the tokens; of ``expert_bytes`` the share of
    the experts that a step's tokens choose. ``flops_per_token`` counts two for each active weight;
    ``pair_flops`` are those of attention per token and token of context it sees, in prefill, and
    ``decode_pair_flops`` in decode (latent attention computes in the latent space there).
    ``cache_bytes_per_token`` and ``cache_fixed_bytes`` are of one sequence; ``window_tokens``
    bounds what attention reads, None if nothing does.
    """

    dense_bytes: int
    expert_bytes: int
    experts: int
    experts_per_token: int
    flops_per_token: int
    pair_flops: int
    decode_pair_flops: int
    cache_bytes_per_token: int
    cache_fixed_bytes: int
    window_tokens: int | None
    collectives: int


@dataclass(frozen=True, slots=True)
class ModelWork:
    """The work of a whole model, cut into ``slices`` tensor slices (1: not cut), on one rank.

    ``head`` is what the last stage computes once per sampled token: final norm and head.
    ``hidden_bytes`` is what one token's hidden state takes on its way to the next stage.
    """

    layers: tuple[LayerWork, ...]
    head: LayerWork
    hidden_bytes: int
    slices: int
