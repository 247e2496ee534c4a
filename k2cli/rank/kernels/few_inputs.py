"""Quantized matrices with few inputs on CUDA: zeros are put after their inputs.

MLX 0.32's CUDA kernel for 16-bit types and quantized matrices (``qmm_sm80.cuh``) reads three tiles
of inputs ahead, also where a matrix has only one or two. It then reads past the end of the last
matrix and of its input, and the process ends where no memory follows them: "an illegal memory
access was encountered". Zeros for the missing inputs change no result.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from k2cli.rank.own_classes import use_own_class

QUANTIZED_LINEARS: tuple[type[nn.Module], ...] = (
    nn.QuantizedLinear,
    nn.QuantizedAllToShardedLinear,
    nn.QuantizedShardedToAllLinear,
)
"""MLX's own classes of quantized linear layers, of which a module is one until k2 changes it."""
TILES_AHEAD = 3
_TILE_INPUTS = 64
"""Inputs of a tile; as many as a group has, if that is more."""


def missing_inputs(inputs: int, group_size: int) -> int:
    """Return the zeros that a matrix needs after its inputs, so that no tile is past its end."""
    return max(TILES_AHEAD * max(_TILE_INPUTS, group_size) - inputs, 0)


def with_zeros(
    arrays: Mapping[str, mx.array], missing: int, *, group_size: int, bits: int
) -> dict[str, mx.array]:
    """Return the arrays of quantized matrices with ``missing`` more inputs, which count nothing.

    Args:
        arrays: ``weight``, ``scales`` and perhaps ``biases``, ``[..., outputs, packed inputs]``.
    """
    more = {name: missing // group_size for name in arrays} | {"weight": missing * bits // 32}
    return {
        name: mx.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, more[name])]) if missing else value
        for name, value in arrays.items()
    }


def lengthened(x: mx.array, missing: int) -> mx.array:
    """Return ``[..., inputs]`` with zeros for the missing inputs.

    Joining takes one kernel where ``mx.pad`` takes two.
    """
    if not missing:
        return x
    return mx.concatenate([x, mx.zeros((*x.shape[:-1], missing), x.dtype)], axis=-1)


class _Lengthened:
    """Subclass, with MLX's class, of a quantized linear layer with zeros after its inputs."""

    missing: int

    def __call__(self, x: mx.array) -> mx.array:
        product: mx.array = super().__call__(lengthened(x, self.missing))  # type: ignore[misc]
        return product


def lengthen_linears(model: nn.Module) -> int:
    """Lengthen the quantized linear layers with few inputs of an evaluated model, in place.

    Returns:
        The number of such layers.
    """
    count = 0
    for module in model.modules():
        if type(module) not in QUANTIZED_LINEARS:
            continue
        group_size, bits = module.group_size, module.bits
        missing = missing_inputs(module["scales"].shape[-1] * group_size, group_size)
        if not missing:
            continue
        arrays = {name: module[name] for name in ("weight", "scales", "biases") if name in module}
        for name, value in with_zeros(arrays, missing, group_size=group_size, bits=bits).items():
            module[name] = value
        mx.eval(module.parameters())
        module.missing = missing
        use_own_class(module, _Lengthened)
        count += 1
    return count
