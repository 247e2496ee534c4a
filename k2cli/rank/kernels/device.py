"""Protection from kernels of MLX that are wrong: other modules on CUDA, a check on every device."""

from __future__ import annotations

import mlx.nn as nn

from k2cli.rank.host_buffers import copies_from_host
from k2cli.rank.kernels.experts import check_experts, part_experts
from k2cli.rank.kernels.few_inputs import lengthen_linears
from k2cli.rank.kernels.gated_experts import computed_matrices
from k2cli.rank.kernels.heads import check_heads, use_own_heads
from k2cli.rank.kernels.own_kernels import (
    find_wrong_kernel,
    leave_own_kernels,
    use_own_kernels,
)
from k2cli.stderr import say_on_stderr


def avoid_wrong_kernels(model: nn.Module) -> None:
    """Replace the modules of an evaluated model for which MLX is wrong, if the device is CUDA."""
    if copies_from_host():
        part_experts(model)
        use_own_heads(model)
        lengthen_linears(model)
    use_own_kernels(model)


def check_kernels(model: nn.Module) -> None:
    """Compare products with those of weights alone: k2's kernels, experts and heads.

    If one of k2's is wrong, the model computes without them, and says so.

    Raises:
        ClusterError: if this device computes one wrong.
    """
    wrong = find_wrong_kernel(model)
    if wrong is not None:
        say_on_stderr(f"k2's own CUDA kernels are not used, MLX's are: {wrong}")
        leave_own_kernels(model)
    check_experts(model, computed_matrices(model))
    check_heads(model)
