"""Quantized projections of all heads: a form of their own on CUDA, and a check on every device.

Latent attention has one matrix per head (``QuantizedMultiLinear`` of mlx-lm). For more than one row
MLX broadcasts the matrices over rows, and its CUDA kernels (0.32, ``broadcast_b`` in
``qmm_utils.h``) then take the first head's matrix for all heads, without an error. So there heads
are the only batch dimension. Matrices with few inputs get zeros as well (see ``few_inputs``).

The check compares with the product of one head alone. It runs on every device after loading, since
wrong heads give fluent, wrong text.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.host_buffers import copies_from_host
from k2cli.rank.kernels.chosen_product import chosen_product, is_known
from k2cli.rank.kernels.comparison import relative_error, wrong_product
from k2cli.rank.kernels.few_inputs import lengthened, missing_inputs, with_zeros

_TOLERANCE = 0.25
"""Bound of an error relative to the largest result. MLX's CPU adds up in bfloat16, and was seen to
differ by 0.06; another head's matrix differs by about 1."""
_CHECKED_ROWS = 3
MOST_ROWS = 16
"""Tokens up to which k2's kernel is faster on CUDA (measured on an H200)."""


class HeadProjection(nn.Module):
    """Stand-in for mlx-lm's ``QuantizedMultiLinear``, called like it.

    Args:
        projection: the module to replace; evaluated.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.group_size: int = projection.group_size
        self.bits: int = projection.bits
        self.mode: str = projection.mode
        self.inputs = projection["scales"].shape[-1] * self.group_size
        self.missing = missing_inputs(self.inputs, self.group_size)
        arrays = with_zeros(
            _arrays(projection), self.missing, group_size=self.group_size, bits=self.bits
        )
        for name, value in arrays.items():
            self[name] = mx.contiguous(value)  # k2's kernel looks at no strides of weights
        mx.eval(self.parameters())
        self.knows_few_rows = is_known([arrays], _settings(self), self.inputs)

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Multiply by each head's matrix ``[outputs, inputs]``, transposed or not.

        Args:
            x: ``[rows, heads or 1, tokens, inputs]``; not transposed, the last one is outputs.

        Returns:
            ``[rows, heads, tokens, outputs]``; not transposed, the last one is inputs.
        """
        rows, _, tokens, width = x.shape
        heads = len(self["weight"])
        if transpose and self._is_for_kernel(x):
            return self._few_rows(x)
        if transpose and self.missing:
            x = lengthened(x, self.missing)
            width += self.missing
        if x.shape[1] != heads:
            x = mx.broadcast_to(x, (rows, heads, tokens, width))
        of_heads = x[0] if rows == 1 else x.swapaxes(0, 1).reshape(heads, rows * tokens, width)
        product = mx.quantized_matmul(
            of_heads,
            self["weight"],
            self["scales"],
            self.get("biases"),
            transpose=transpose,
            **_settings(self),
        )
        product = product.reshape(heads, rows, tokens, -1).swapaxes(0, 1)
        return product if transpose else product[..., : self.inputs]

    def _is_for_kernel(self, x: mx.array) -> bool:
        rows, heads, tokens, _ = x.shape
        few = rows * tokens <= MOST_ROWS and heads == len(self["weight"])
        return few and self.knows_few_rows and copies_from_host()

    def _few_rows(self, x: mx.array) -> mx.array:
        rows, heads, tokens, width = x.shape
        product = chosen_product(
            x.reshape(rows * heads * tokens, width),
            mx.broadcast_to(_heads_of_tokens(heads, tokens), (rows, heads * tokens)),
            [_arrays(self)],
            _settings(self),
        )
        return product.reshape(rows, heads, tokens, -1)


@functools.cache
def _heads_of_tokens(heads: int, tokens: int) -> mx.array:
    """Return the heads of one row, each as often as there are tokens."""
    result = mx.repeat(mx.arange(heads, dtype=mx.uint32), tokens)
    mx.eval(result)
    return result


def dequantized(projection: nn.Module) -> mx.array:
    """Return the matrices of all heads, ``[heads, outputs, inputs]``, lazily."""
    weights = mx.dequantize(
        projection["weight"],
        projection["scales"],
        projection.get("biases"),
        **_settings(projection),
    )
    if isinstance(projection, HeadProjection):
        return weights[..., : projection.inputs]
    return weights


def use_own_heads(model: nn.Module) -> int:
    """Replace the quantized projections of heads of an evaluated model; return their number."""
    found = _projections(model)
    for owner, key, member in found:
        if not isinstance(member, HeadProjection):
            owner[key] = HeadProjection(member)
    return len(found)


def check_heads(model: nn.Module) -> int:
    """Compare products of all heads with products of one head's weights alone.

    Looks at the first and the last head of each shape, with one and with several rows, for one
    token and for a chunk, in the two forms in which mlx-lm asks for them. Projections for which the
    device is wrong are replaced by those of this module, and checked again.

    Returns:
        The number of shapes that were looked at.

    Raises:
        ClusterError: if a result differs, with the shape and the head.
    """
    seen: set[Any] = set()
    for _, _, projection in _projections(model):
        shape = head_shape(projection)
        if shape in seen:
            continue
        seen.add(shape)
        if wrong_head(projection) is not None and not isinstance(projection, HeadProjection):
            use_own_heads(model)
            return check_heads(model)
        wrong = wrong_head(projection)
        if wrong is not None:
            head, error = wrong
            heads, outputs, inputs, *_ = shape
            raise wrong_product(
                f"head {head} of {heads}",
                outputs=outputs,
                inputs=inputs,
                bits=projection.bits,
                error=error,
            )
    return len(seen)


def wrong_head(projection: nn.Module) -> tuple[int, float] | None:
    """Return a head whose product is wrong, and by how much; None if none was found."""
    heads, outputs, inputs, *_ = head_shape(projection)
    dtype = projection["scales"].dtype
    dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16
    for rows, tokens in ((1, 1), (_CHECKED_ROWS, 1), (_CHECKED_ROWS, 20)):
        for transpose, width in ((True, inputs), (False, outputs)):
            # Waves that no short period repeats, so that other weights give another result.
            waves = mx.cos(mx.arange(rows * heads * tokens * width, dtype=mx.float32) * 1.7)
            x = waves.astype(dtype).reshape(rows, heads, tokens, width)
            found = projection(x, transpose=transpose)
            for head in sorted({0, heads - 1}):
                wanted = _alone(projection, x[:, head], head, transpose)
                if not mx.all(mx.isfinite(wanted)).item():
                    continue  # a fault of the checkpoint: the self-test names it
                error = relative_error(found[:, head], wanted)
                if not error <= _TOLERANCE:
                    return head, error
    return None


def _alone(projection: nn.Module, x: mx.array, head: int, transpose: bool) -> mx.array:
    """Multiply ``[rows, tokens, width]`` by one head's weights, dequantized, in float32."""
    weight = dequantized(projection)[head].astype(mx.float32)
    return x.astype(mx.float32) @ (weight.T if transpose else weight)


def _projections(model: nn.Module) -> list[tuple[Any, str, nn.Module]]:
    """List the quantized projections of heads of a model: owner, its key, and the module."""
    kinds = (mlx_lm_module("models.mla").QuantizedMultiLinear, HeadProjection)
    return [
        (owner, key, member)
        for _, owner in model.named_modules()
        for key, member in owner.items()
        if isinstance(member, kinds)
    ]


def _arrays(projection: nn.Module) -> dict[str, mx.array]:
    names = ("weight", "scales", "biases")
    return {name: projection[name] for name in names if projection.get(name) is not None}


def head_shape(projection: nn.Module) -> tuple[int, ...]:
    """Return heads, outputs, inputs, and what else decides which kernel computes it."""
    heads, outputs, groups = projection["scales"].shape
    settings = _settings(projection)
    inputs = getattr(projection, "inputs", groups * settings["group_size"])
    return heads, outputs, inputs, settings["group_size"], settings["bits"], settings["mode"]


def _settings(projection: nn.Module) -> dict[str, Any]:
    return {name: getattr(projection, name) for name in ("group_size", "bits", "mode")}
