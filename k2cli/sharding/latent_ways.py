"""Choice of the way in which a step computes latent attention (MLA), from its shapes alone.

mlx-lm's class for DeepSeek-V3 and Kimi K2 *expands* keys and values of the whole context from the
cached latents for every step of several tokens. With few queries it is cheaper to let the queries
and outputs change into the latent space (*absorbed*), as every decode step does. Both can be
computed in *blocks* of the context, so that no array has the size of chunk times context.

``rank.attention.latent`` computes it; the activation model of ``planning.memory`` knows the same
choice. The plan makes it once for all ranks, which then agree on every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k2cli.mlx_lm_package import mlx_lm_module

if TYPE_CHECKING:
    import mlx.nn as nn

EXPANSION_WEIGHTS: Mapping[str, float] = {"cpu": 1.0, "metal": 1.0, "cuda": 1.0}
"""Time of an operation of expanding relative to one of attention, by ``choices.Device``.

1 means that operations alone decide: K2 then computes up to 170 queries absorbed. ``metal``: no
measurement of ours; prefill of K2 runs at the matmul ceiling there, and others switch at about 170
queries. ``cuda``: one full-width layer on an H200 took 0.58 (context of 16,384) and 0.72 (65,536)
of mlx-lm's time with 160 queries. ``cpu``: see docs/design/decisions.md.
"""

BLOCK_TOKENS = 1024
"""Tokens of context in a block, where a plan asks for blocks."""

ABSORBED_BLOCKS = 4
"""Blocks that one block of absorbed attention, which has few queries, is as long as."""


@dataclass(frozen=True, slots=True)
class LatentSettings:
    """Settings for all layers, the same on every rank of a run.

    ``expansion_weight`` is that of ``is_absorbed``; ``block_tokens`` are the tokens of context in a
    block in which keys and values are expanded, 0 for no blocks.
    """

    expansion_weight: float
    block_tokens: int = 0

    def block_length(self, *, absorbed: bool) -> int:
        """Return the tokens of a block, 0 if the context is not cut."""
        return self.block_tokens * (ABSORBED_BLOCKS if absorbed else 1)


@dataclass(frozen=True, slots=True)
class LatentWidths:
    """Widths that decide: one head's expanded key and value together, and the latent."""

    expanded: int
    latent: int


def is_absorbed(
    widths: LatentWidths, expansion_weight: float, queries: int, context_length: int
) -> bool:
    """True if ``queries`` new tokens of a sequence are computed in the latent space.

    Compares multiplications per head: expanding the context against the wider scores and outputs
    of absorbed attention, and its change of queries and outputs.

    Args:
        expansion_weight: of ``EXPANSION_WEIGHTS``; 0 to never absorb.
        context_length: tokens of the sequence, the new ones included.
    """
    expanding = widths.latent * widths.expanded
    wider = 2 * widths.latent - widths.expanded
    extra = queries * (context_length * wider + expanding)
    # A narrow latent makes all of it cheaper, so that the weight alone would not say never.
    return expansion_weight > 0 and extra < expansion_weight * context_length * expanding


def most_absorbed_queries(
    widths: LatentWidths, expansion_weight: float, queries: int, context_length: int
) -> int:
    """Return the most queries, up to ``queries``, that are computed absorbed; 0 if none are."""
    low, high = 0, min(queries, context_length)
    while low < high:
        middle = (low + high + 1) // 2
        if is_absorbed(widths, expansion_weight, middle, context_length):
            low = middle
        else:
            high = middle - 1
    return low


def expansion_weight(devices: Iterable[str]) -> float:
    """Return the weight for a run: the least of its devices', so that all ranks agree."""
    return min(EXPANSION_WEIGHTS.get(device, 1.0) for device in devices)


def has_own_attention(model: nn.Module) -> bool:
    """True if memory is planned for k2's own attention: for layers of DeepSeek-V3's class.

    DeepSeek-V3.2 is computed absorbed, too, but its indexer makes scores of chunk times context
    whatever attention does, so that it is planned as mlx-lm's class.
    """
    kind = mlx_lm_module("models.deepseek_v3").DeepseekV3Attention
    return any(type(module) is kind for module in model.modules())
