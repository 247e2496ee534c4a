"""Protection from kernels of MLX that are wrong: other modules on CUDA, a check on every device."""

from __future__ import annotations

import mlx.nn as nn

from k2cli.rank.host_buffers import copies_from_host
from k2cli.rank.kernels.experts import check_experts, part_experts
from k2cli.rank.kernels.few_inputs import lengthen_linears
from k2cli.rank.kernels.heads import check_heads, use_own_heads


def avoid_wrong_kernels(model: nn.Module) -> None:
    """Replace the modules of an evaluated model for which MLX is wrong, if the device is CUDA."""
    if copies_from_host():
        part_experts(model)
        use_own_heads(model)
        lengthen_linears(model)


def check_kernels(model: nn.Module) -> None:
    """Compare products of experts and heads with those of their weights alone.

    Raises:
        ClusterError: if this device computes one wrong.
    """
    check_experts(model)
    check_heads(model)
