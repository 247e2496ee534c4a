"""Quantized experts on CUDA: gate, up and activation in one kernel, down in another.

It replaces the class of mlx-lm's ``SwitchGLU`` by a subclass, whose parameters stay what they are.
From 1 row to 2,048 the kernels take half of the time of MLX's on an H200 (K2's experts, 4 bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.joined_projections import JoinedProjection
from k2cli.rank.kernels.chosen_product import MOST_CHOICES, chosen_product, is_known
from k2cli.rank.kernels.experts import PartedExperts
from k2cli.rank.own_classes import use_own_class

MOST_PAIRS = 65_535
"""Pairs of a row and one of its experts that a launch takes: a limit of CUDA."""

_Parts = list[Mapping[str, mx.array]]


def use_own_experts(model: nn.Module) -> int:
    """Let experts in parts compute with k2's kernels; return the number of layers."""
    count = 0
    for module in model.modules():
        if type(module) is mlx_lm_module("models.switch_layers").SwitchGLU and _fits(module):
            use_own_class(module, GatedExperts)
            count += 1
    return count


class GatedExperts:
    """Subclass, together with mlx-lm's class, of the experts of a layer."""

    def __call__(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        """Multiply rows ``[..., width]`` by the experts ``[..., experts per row]`` of each."""
        chosen, rows = indices.reshape(-1, indices.shape[-1]), x.reshape(-1, x.shape[-1])
        step = max(MOST_PAIRS // chosen.shape[1], 1)
        pieces = [
            self._products(rows[first : first + step], chosen[first : first + step])
            for first in range(0, len(rows), step)
        ]
        product: mx.array = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        return product.reshape(*indices.shape, -1)

    def added_up(self: Any, x: mx.array, chosen: mx.array, factors: mx.array) -> mx.array:
        """Add up the experts of rows, each times its factor.

        Args:
            x: ``[rows, width]``.
            chosen, factors: ``[rows, experts per row]``, at most ``MOST_CHOICES``; float32.

        Returns:
            ``[rows, width]``.
        """
        result: mx.array = self._products(x, chosen, factors)
        return result

    def _products(
        self: Any, x: mx.array, chosen: mx.array, factors: mx.array | None = None
    ) -> mx.array:
        parts, settings = gate_and_up(self)
        hidden = chosen_product(x, chosen, parts, settings, gated=True)
        down = self.down_proj
        return chosen_product(hidden, chosen, down.parts, down.settings, factors=factors)


def computed_matrices(model: nn.Module) -> list[nn.Module]:
    """List the experts' matrices that k2's kernels compute, whatever the number of rows."""
    found = []
    for module in model.modules():
        if isinstance(module, GatedExperts):
            layer: Any = module
            gate = layer.gate_proj
            joined = isinstance(gate, JoinedProjection)
            found += [gate.both] if joined else [gate, layer.up_proj]
            found.append(layer.down_proj)
    return found


def adds_up(experts: Any, choices: int) -> bool:
    """True if ``added_up`` may be asked for so many experts per row."""
    return isinstance(experts, GatedExperts) and choices <= MOST_CHOICES


def gate_and_up(experts: Any) -> tuple[_Parts, dict[str, Any]]:
    """Return the parts of both projections, the gate's first, and how they are quantized."""
    gate, up = experts.gate_proj, experts.up_proj
    if isinstance(gate, JoinedProjection):
        return gate.both.parts, gate.both.settings
    return gate.parts + up.parts, gate.settings


def _fits(experts: Any) -> bool:
    """True if the kernels can compute all that these experts do."""
    if type(experts.activation) is not mlx_lm_module("models.switch_layers").SwiGLU:
        return False
    gate, up, down = experts.gate_proj, experts.up_proj, experts.down_proj
    joined = isinstance(gate, JoinedProjection)
    matrices = [gate.both, down] if joined else [gate, up, down]
    if not all(isinstance(each, PartedExperts) and "bias" not in each for each in matrices):
        return False
    if not joined and gate.settings != up.settings:
        return False
    parts, settings = gate_and_up(experts)
    return is_known(parts, settings, matrices[0].inputs, gated=True) and is_known(
        down.parts, down.settings, down.inputs
    )
