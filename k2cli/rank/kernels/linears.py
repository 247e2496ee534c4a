"""Quantized linear layers on CUDA: rows are computed together, few rows by k2's own kernel.

A batch of single tokens is ``[rows, 1, inputs]``. MLX 0.32 multiplies each row of it alone on CUDA,
and reads the weights as often (eight rows of K2's head: 3.9 ms on an H200, as rows of one matrix
0.53, with the kernel 0.37). Layers keep their parameters.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.rank.kernels.few_inputs import QUANTIZED_LINEARS
from k2cli.rank.kernels.shared_product import DTYPES, MOST_ROWS, is_known, shared_product
from k2cli.rank.own_classes import use_own_class
from k2cli.sharding.tensor import ShardedHead


def use_own_linears(model: nn.Module) -> int:
    """Let quantized linear layers, and a head in slices, compute rows together.

    Returns:
        The number of such layers.
    """
    own_classes: dict[type, type] = dict.fromkeys(QUANTIZED_LINEARS, RowsTogether)
    own_classes[ShardedHead] = HeadRowsTogether
    count = 0
    for module in model.modules():
        own = own_classes.get(type(module))
        if own is not None and "scales" in module and is_known(module, vars(module)):
            use_own_class(module, own)
            count += 1
    return count


class RowsTogether:
    """Subclass, together with MLX's class, of a quantized linear layer."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        """Multiply ``[..., inputs]``, as MLX's class does."""
        *leading, inputs = x.shape
        rows = x.size // inputs
        if not _is_for_kernel(rows, x.dtype):
            output: mx.array = super().__call__(x.reshape(rows, inputs))  # type: ignore[misc]
            return output.reshape(*leading, output.shape[-1])
        product: mx.array = self.product(x.reshape(rows, inputs))
        if isinstance(self, nn.QuantizedShardedToAllLinear):
            product = mx.distributed.all_sum(product, group=self.group)
        if "bias" in self:
            product = product + self["bias"]
        return product.reshape(*leading, product.shape[-1])

    def product(self: Any, x: mx.array) -> mx.array:
        """Multiply at most ``MOST_ROWS`` rows by this rank's weights alone."""
        return shared_product(x, self, self.group_size)


class HeadRowsTogether:
    """Subclass, together with ``ShardedHead``, of a quantized head in slices."""

    def product(self: Any, hidden: mx.array) -> mx.array:
        """Multiply ``[..., width]`` by this rank's rows, as ``ShardedHead`` does."""
        *leading, width = hidden.shape
        rows = hidden.size // width
        x = hidden.reshape(rows, width)
        product: mx.array = (
            shared_product(x, self, self.group_size)
            if _is_for_kernel(rows, x.dtype)
            else super().product(x)  # type: ignore[misc]
        )
        return product.reshape(*leading, product.shape[-1])


def _is_for_kernel(rows: int, dtype: mx.Dtype) -> bool:
    return 0 < rows <= MOST_ROWS and dtype in DTYPES
