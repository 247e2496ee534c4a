"""Feed-forward parts of DeepSeek-V3's layers (Kimi K2's too) on CUDA, for few rows.

A step of one token is so short on a GPU that building its graph and starting its kernels, one by
one, takes the processor longer than the GPU computes. So the choice of experts is one kernel, the
experts' results are added up where they are computed, and ``mx.compile`` builds the graph of a
whole part at once and joins its elementwise operations.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels.expert_choice import MOST_EXPERTS, chosen_experts
from k2cli.rank.kernels.gated_experts import adds_up
from k2cli.rank.own_classes import use_own_class

MOST_ROWS = 32
"""Rows up to which a part is compiled; each number of rows takes some milliseconds once."""


def compile_feed_forward(model: nn.Module) -> int:
    """Compile the feed-forward parts of a model for few rows; return their number."""
    deepseek = mlx_lm_module("models.deepseek_v3")
    own = {deepseek.DeepseekV3MoE: _CompiledMoE, deepseek.DeepseekV3MLP: _Compiled}
    count = 0
    for module in model.modules():
        if type(module) in own and not is_shared(module):
            use_own_class(module, own[type(module)])
            count += 1
    return count


def forget_feed_forward(model: nn.Module) -> None:
    """Let parts be compiled again at their next call: what they call has changed."""
    for module in model.modules():
        if isinstance(module, _Compiled):
            vars(module).pop("_of_few", None)


def is_shared(module: nn.Module) -> bool:
    """True if ranks compute a module together; what they exchange is not compiled."""
    return getattr(module, "sharding_group", None) is not None or any(
        "group" in vars(member) for member in module.modules()
    )


class _Compiled:
    """Subclass, together with mlx-lm's class, of a feed-forward part."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """Compute ``[..., width]``, as mlx-lm's class does."""
        if x.size > MOST_ROWS * x.shape[-1]:
            return self._as_mlx_lm(x)  # type: ignore[no-any-return]
        if "_of_few" not in vars(self):
            self._of_few = mx.compile(self._few_rows)
        result: mx.array = self._of_few(x)
        return result

    def _as_mlx_lm(self: Any, x: mx.array) -> mx.array:
        output: mx.array = super().__call__(x)  # type: ignore[misc]
        return output

    def _few_rows(self: Any, x: mx.array) -> mx.array:
        return self._as_mlx_lm(x)  # type: ignore[no-any-return]


class _CompiledMoE(_Compiled):
    """Subclass of ``DeepseekV3MoE``."""

    def _few_rows(self: Any, x: mx.array) -> mx.array:
        gate = self.gate
        if (
            gate.n_group > 1
            or gate.n_routed_experts > MOST_EXPERTS
            or not adds_up(self.switch_mlp, gate.top_k)
        ):
            return self._as_mlx_lm(x)  # type: ignore[no-any-return]
        rows = x.reshape(-1, x.shape[-1])
        chosen, factors = chosen_experts(
            rows @ gate.weight.T,
            gate.e_score_correction_bias,
            choices=gate.top_k,
            normalised=gate.top_k > 1 and gate.norm_topk_prob,
            scale=gate.routed_scaling_factor,
        )
        result: mx.array = self.switch_mlp.added_up(rows, chosen, factors).reshape(x.shape)
        if self.config.n_shared_experts is not None:
            result = result + self.shared_experts(x)
        return result
