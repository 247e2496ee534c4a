"""k2's own CUDA kernels in a model: where they are used, and whether they are right here.

They are faster than MLX's and never needed: where one cannot be compiled, or computes something
wrong, a rank says so and goes on without any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.rank.attention.one_token import forget_one_token
from k2cli.rank.host_buffers import copies_from_host
from k2cli.rank.joined_projections import JoinedProjection
from k2cli.rank.kernels.comparison import relative_error
from k2cli.rank.kernels.expert_choice import chosen_experts
from k2cli.rank.kernels.experts import one_expert_product
from k2cli.rank.kernels.feed_forward import compile_feed_forward, forget_feed_forward
from k2cli.rank.kernels.gated_experts import GatedExperts, gate_and_up, use_own_experts
from k2cli.rank.kernels.heads import HeadProjection, head_shape, wrong_head
from k2cli.rank.kernels.linears import HeadRowsTogether, RowsTogether, use_own_linears
from k2cli.rank.kernels.shared_product import DTYPES
from k2cli.rank.own_classes import leave_own_class

_LEAST_CAPABILITY = 8
"""Compute capability (major) from which tensor cores multiply bfloat16."""
_TOLERANCE = 0.05
"""Bound of an error relative to the largest result; bfloat16 was seen to differ by 0.006."""
_CHECKED_ROWS = (1, 9)
_CHECKED_OUTPUTS = 64


def use_own_kernels(model: nn.Module) -> None:
    """Let an evaluated model use k2's kernels, if the device is a GPU that can."""
    if not copies_from_host() or not _is_capable():
        _leave_heads(model)
        return
    use_own_experts(model)
    use_own_linears(model)
    compile_feed_forward(model)


def find_wrong_kernel(model: nn.Module) -> str | None:
    """Compare products of k2's kernels with those of dequantized weights, in float32.

    Returns:
        What is wrong, or cannot be compiled; None if all is right.
    """
    try:
        for what, error in _errors(model):
            if not error <= _TOLERANCE:
                return f"{what} differs by {error:.2g} of the largest result"
    except Exception as error:  # a kernel that cannot be compiled, or whatever else is wrong
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def leave_own_kernels(model: nn.Module) -> None:
    """Let a model compute everything with MLX's kernels again."""
    for module in model.modules():
        for own in (GatedExperts, RowsTogether, HeadRowsTogether):
            leave_own_class(module, own)
    _leave_heads(model)
    forget_feed_forward(model)
    forget_one_token(model)


def _leave_heads(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, HeadProjection):
            module.knows_few_rows = False


def _is_capable() -> bool:
    found: Any = mx.device_info().get("compute_capability_major", 0)
    return int(found) >= _LEAST_CAPABILITY


def _errors(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield what was compared and its error, once for each shape."""
    seen: set[Any] = set()
    for module in model.modules():
        if isinstance(module, RowsTogether | HeadRowsTogether):
            linear: Any = module
            shape: Any = (
                linear["weight"].shape,
                linear.bits,
                linear.group_size,
                linear["scales"].dtype,
            )
            if shape not in seen:
                seen.add(shape)
                yield from _linear_errors(linear)
        elif isinstance(module, GatedExperts):
            experts: Any = module
            shape = _experts_shape(experts)
            if shape not in seen:
                seen.add(shape)
                yield from _expert_errors(experts)
        elif isinstance(module, HeadProjection) and module.knows_few_rows:
            shape = head_shape(module)
            if shape not in seen:
                seen.add(shape)
                found = wrong_head(module)
                yield f"a product of {shape[0]} heads", 0.0 if found is None else found[1]
    if any(isinstance(module, GatedExperts) for module in model.modules()):
        yield _choice_error()


def _experts_shape(experts: Any) -> tuple[Any, ...]:
    """Return all that decides which kernels compute experts."""
    matrices = gate_and_up(experts), (experts.down_proj.parts, experts.down_proj.settings)
    return tuple(
        (
            *settings.values(),
            *((value.shape, value.dtype) for part in parts for value in part.values()),
        )
        for parts, settings in matrices
    )


def _waves(rows: int, width: int, dtype: mx.Dtype) -> mx.array:
    """Return ``[rows, width]`` that no short period repeats: other weights give other results."""
    waves = mx.cos(mx.arange(rows * width, dtype=mx.float32) * 1.7)
    return waves.astype(dtype).reshape(rows, width)


def _linear_errors(linear: Any) -> Iterator[tuple[str, float]]:
    dtype = linear["scales"].dtype if linear["scales"].dtype in DTYPES else DTYPES[0]
    outputs, words = linear["weight"].shape
    inputs = words * 32 // linear.bits
    ends = [slice(0, _CHECKED_OUTPUTS), slice(max(outputs - _CHECKED_OUTPUTS, 0), outputs)]
    for rows in _CHECKED_ROWS:
        x = _waves(rows, inputs, dtype)
        # The product alone: a linear layer may add what other ranks have.
        found = linear.product(x)
        for end in ends:
            weight = mx.dequantize(
                linear["weight"][end],
                linear["scales"][end],
                linear["biases"][end],
                group_size=linear.group_size,
                bits=linear.bits,
            )
            wanted = x.astype(mx.float32) @ weight.astype(mx.float32).T
            if mx.all(mx.isfinite(wanted)).item():
                yield (
                    f"a product of {outputs:,} by {inputs:,}",
                    relative_error(found[:, end], wanted),
                )


def _expert_errors(experts: Any) -> Iterator[tuple[str, float]]:
    gate, up, down = experts.gate_proj, experts.up_proj, experts.down_proj
    first = gate.both if isinstance(gate, JoinedProjection) else gate
    count, dtype = len(down.parts[0]["weight"]), down.parts[0]["scales"].dtype
    chosen = sorted({0, count * 4 // 5, count - 1})
    x = _waves(1, first.inputs, dtype)
    wanted = []
    for expert in chosen:
        if first is gate:
            one, other = (one_expert_product(each, x, expert) for each in (gate, up))
        else:
            one, other = mx.split(one_expert_product(first, x, expert), [gate.width], axis=-1)
        hidden = (nn.silu(one.astype(mx.float32)) * other.astype(mx.float32)).astype(dtype)
        wanted.append(one_expert_product(down, hidden[None], expert))
    if not mx.all(mx.isfinite(mx.stack(wanted))).item():
        return  # a fault of the checkpoint, not of the device: the self-test names it
    what = f"a product of experts of {first.inputs:,} inputs"
    indices = mx.array([chosen], dtype=mx.uint32)
    yield what, relative_error(experts(x, indices)[0], mx.stack(wanted))
    factors = mx.arange(1, len(chosen) + 1, dtype=mx.float32)[None] / 10
    found = experts.added_up(x, indices, factors)[0]
    summed = (mx.stack(wanted).astype(mx.float32) * factors.T).sum(axis=0)
    yield f"{what}, added up,", relative_error(found, summed)


def _choice_error() -> tuple[str, float]:
    logits, correction = _waves(2, 96, mx.float32), _waves(1, 96, mx.float32)[0] / 3
    chosen, factors = chosen_experts(logits, correction, choices=4, normalised=True, scale=2.5)
    weights = mx.sigmoid(logits)
    order = mx.argsort(-(weights + correction), axis=-1)[:, :4]
    wanted = mx.take_along_axis(weights, order, axis=-1)
    wanted = wanted / wanted.sum(axis=-1, keepdims=True) * 2.5
    same = mx.array_equal(chosen, order.astype(mx.uint32)).item()
    return "the choice of experts", relative_error(factors, wanted) if same else float("inf")
