"""Matrices of a layer's experts on this device: parts of them on CUDA, and a check everywhere.

On CUDA, MLX 0.32's ``gather_qmm`` computes the place of an expert's weights with 32 bits. In a
matrix of more than 2^32 elements it multiplies by other weights from there on, without an error: of
Kimi K2's 384 experts (2,048 by 7,168) these are the last 91. A launch of more than 65,535 rows
fails there. So such matrices are held in parts along their outputs, which costs one more kernel and
no more reading, and longer batches of rows are computed in pieces.

The check compares a few experts with an ordinary quantized product of their weights alone. It
runs on every device after loading, because a wrong expert gives fluent, wrong text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels.comparison import relative_error, wrong_product
from k2cli.rank.kernels.few_inputs import lengthened, missing_inputs, with_zeros

LARGEST_ELEMENTS = 2**32
"""Elements of a matrix of all experts that the kernel addresses right (measured on an H200)."""
MOST_ROWS = 65_535
"""Rows of one launch: a limit of CUDA for the third dimension of a grid of blocks."""
_OUTPUT_STEP = 128
"""Parts are multiples of this, the width of a tile of the kernel."""
_TOLERANCE = 0.05
"""Bound of an error relative to the largest result; bfloat16 was seen to differ by 0.01."""


class PartedExperts(nn.Module):
    """Stand-in for mlx-lm's ``QuantizedSwitchLinear`` on CUDA, called like it.

    Args:
        experts: the module to replace; evaluated.
        largest_elements: elements of all experts that a part may have.
    """

    def __init__(self, experts: nn.Module, largest_elements: int = LARGEST_ELEMENTS) -> None:
        super().__init__()
        self.settings = _settings(experts)
        self.inputs = _inputs(experts)
        self.missing = missing_inputs(self.inputs, self.settings["group_size"])
        whole = with_zeros(
            _parts(experts)[0],
            self.missing,
            group_size=self.settings["group_size"],
            bits=self.settings["bits"],
        )
        outputs = whole["weight"].shape[1]
        width = _width(experts, largest_elements)
        self.parts = [
            {name: _part(value, first, first + width) for name, value in whole.items()}
            for first in range(0, outputs, width)
        ]
        if "bias" in experts:
            self.bias = experts["bias"]

    def __call__(
        self, inputs: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        """Multiply rows by the weights of their experts.

        Args:
            inputs: ``[..., rows or 1, 1, inputs]``; with ``sorted_indices`` ``[rows, 1, inputs]``.
            indices: expert of each row; the leading dimensions of the result.

        Returns:
            ``[*indices.shape, 1, outputs]``.
        """
        if sorted_indices and indices.size > MOST_ROWS:
            pieces = [
                self._product(
                    inputs[first : first + MOST_ROWS], indices[first : first + MOST_ROWS], True
                )
                for first in range(0, indices.size, MOST_ROWS)
            ]
            return mx.concatenate(pieces)
        return self._product(inputs, indices, sorted_indices)

    def _product(self, inputs: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        inputs = lengthened(inputs, self.missing)
        products = [
            mx.gather_qmm(
                inputs,
                part["weight"],
                part["scales"],
                part.get("biases"),
                rhs_indices=indices,
                transpose=True,
                sorted_indices=sorted_indices,
                **self.settings,
            )
            for part in self.parts
        ]
        product = products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)
        if "bias" in self:
            product = product + mx.expand_dims(self["bias"][indices], -2)
        return product


def stays_whole(one: nn.Module, other: nn.Module) -> bool:
    """True if two matrices of the same inputs need no parts as one matrix.

    Three parts of both were slower on an H200 than two of each: by 1.5 % with eight rows.
    """
    if "scales" not in one or one["weight"].ndim < 3:  # never in parts
        return True
    joined = sum(int(each["weight"].shape[-2]) for each in (one, other))
    return _width_of(one, joined, LARGEST_ELEMENTS) == joined


def _width(experts: nn.Module, largest_elements: int) -> int:
    """Return the outputs of a part."""
    return _width_of(experts, int(_parts(experts)[0]["weight"].shape[1]), largest_elements)


def _width_of(experts: nn.Module, outputs: int, largest_elements: int) -> int:
    """Return the outputs of a part of as many experts and inputs, with ``outputs`` in all."""
    each = len(_parts(experts)[0]["weight"]) * _inputs(experts)  # elements of one output
    parts = -(-outputs * each // largest_elements)
    if parts == 1:
        return outputs
    even = -(-outputs // (parts * _OUTPUT_STEP)) * _OUTPUT_STEP
    return even if even * each <= largest_elements else max(even - _OUTPUT_STEP, _OUTPUT_STEP)


def part_experts(model: nn.Module, largest_elements: int = LARGEST_ELEMENTS) -> None:
    """Replace the quantized experts of an evaluated model by ones in parts.

    Needs memory for one more copy of a layer's matrix at a time.
    """
    whole = [(o, key) for o, key, one in _experts(model) if not isinstance(one, PartedExperts)]
    for owner, key in whole:
        # No other reference may be left: the whole matrix is freed before the next one is cut.
        owner[key] = PartedExperts(owner[key], largest_elements)
        mx.clear_cache()


def check_experts(model: nn.Module, others: Iterable[nn.Module] = ()) -> int:
    """Compare products of quantized experts with products of one expert's weights alone.

    Looks at the first, the last and one more expert of each shape of matrix, in the two forms in
    which mlx-lm asks for them.

    Args:
        others: matrices of the model that MLX's kernels never compute; these would be compiled for
            nothing.

    Returns:
        The number of matrices that were looked at.

    Raises:
        ClusterError: if a result differs, with the shape and the expert.
    """
    seen: set[Any] = set()
    skipped = {id(each) for each in others}
    for _, _, experts in _experts(model):
        if id(experts) in skipped:
            continue
        first = _parts(experts)[0]
        settings = _settings(experts)
        shape = (first["weight"].shape, len(_parts(experts)), *settings.values())
        if settings["global_scale"] is None and shape not in seen:
            seen.add(shape)
            _check(experts)
    return len(seen)


def _check(experts: nn.Module) -> None:
    first = _parts(experts)[0]
    count, width, dtype = len(first["weight"]), _inputs(experts), first["scales"].dtype
    dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16
    chosen = sorted({0, count * 4 // 5, count - 1})
    # Waves that no short period repeats, so that weights of another place give another result.
    row = mx.cos(mx.arange(width, dtype=mx.float32) * 1.7).astype(dtype)[None]
    wanted = [one_expert_product(experts, row, expert) for expert in chosen]
    found = experts(row[None, None], mx.array([chosen], dtype=mx.uint32))[0, :, 0]
    # Metal has a kernel of its own for sorted rows from four per expert.
    each = (64 if mx.default_device() == mx.cpu else 4 * count) // len(chosen) + 1
    many = mx.repeat(mx.array(chosen, dtype=mx.uint32), each)
    in_order = experts(mx.broadcast_to(row, (many.size, 1, width)), many, True)[::each, 0]
    for index, expert in enumerate(chosen):
        if not mx.all(mx.isfinite(wanted[index])).item():
            continue  # a fault of the checkpoint, not of the device: the self-test names it
        for form in (found, in_order):
            error = relative_error(form[index], wanted[index])
            if not error <= _TOLERANCE:
                outputs, bits = wanted[index].size, _settings(experts)["bits"]
                raise wrong_product(
                    f"expert {expert} of {count}",
                    outputs=outputs,
                    inputs=width,
                    bits=bits,
                    error=error,
                )


def one_expert_product(experts: nn.Module, row: mx.array, expert: int) -> mx.array:
    """Multiply ``[1, inputs]`` by one expert's weights, with MLX's product: ``[outputs]``."""
    settings = {name: value for name, value in _settings(experts).items() if value is not None}
    products = []
    for part in _parts(experts):
        biases = part.get("biases")
        products.append(
            mx.quantized_matmul(
                lengthened(row, getattr(experts, "missing", 0)),
                part["weight"][expert],
                scales=part["scales"][expert],
                biases=None if biases is None else biases[expert],
                transpose=True,
                **settings,
            )[0]
        )
    product = mx.concatenate(products)
    return product + experts["bias"][expert] if "bias" in experts else product


def _experts(model: nn.Module) -> list[tuple[Any, str, nn.Module]]:
    """List the quantized experts of a model: owner, its key, and the module."""
    kinds = (mlx_lm_module("models.switch_layers").QuantizedSwitchLinear, PartedExperts)
    return [
        (owner, key, member)
        for _, owner in model.named_modules()
        for key, member in owner.items()
        if isinstance(member, kinds)
    ]


def _parts(experts: nn.Module) -> list[dict[str, mx.array]]:
    """Return the arrays of experts, in parts along their outputs."""
    if isinstance(experts, PartedExperts):
        return experts.parts
    names = ("weight", "scales", "biases")
    return [{name: experts[name] for name in names if experts.get(name) is not None}]


def _settings(experts: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that say how experts are quantized."""
    if isinstance(experts, PartedExperts):
        return experts.settings
    names = ("group_size", "bits", "mode", "global_scale")
    return {name: getattr(experts, name, None) for name in names}


def _inputs(experts: nn.Module) -> int:
    if isinstance(experts, PartedExperts):
        return experts.inputs
    return int(_parts(experts)[0]["scales"].shape[-1] * _settings(experts)["group_size"])


def _part(value: mx.array, first: int, past_last: int) -> mx.array:
    # Contiguous also where it is all of it: k2's kernels look at no strides of weights.
    part = mx.contiguous(value[:, first:past_last])
    mx.eval(part)
    return part
