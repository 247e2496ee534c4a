"""Stand-ins for modules that another pipeline stage holds, and a wrapper that observes a layer.

A stage is the whole model with stand-ins in the places of layers, embedding, norm and head of
other stages (``stage``). They have no parameters. ``without_values`` stands in for forward code.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class NotOnThisStage(AttributeError):
    """Error: a model's forward code uses a part of a layer that another stage holds."""


class ModuleStandIn(nn.Module):
    """Stand-in for a module: a copy of its plain attributes and of its parts' attributes.

    A model's forward code may read them of its layers (``use_sliding``, ``self_attn.is_local``).
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        properties = (n for n, value in vars(type(replaced)).items() if isinstance(value, property))
        for name in (*vars(replaced), *properties):
            value = None if name.startswith("_") else getattr(replaced, name, None)
            if isinstance(value, bool | int | float | str):
                object.__setattr__(self, name, value)
        for name, part in replaced.children().items():
            if isinstance(part, nn.Module):
                object.__setattr__(self, name, ModuleStandIn(part))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise NotOnThisStage(name) from error


class LayerStandIn(ModuleStandIn):
    """Stand-in for a decoder layer of another stage: returns the hidden states unchanged."""

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        return _hidden_among(*arguments, *named.values())


def _hidden_among(*arguments: Any) -> mx.array:
    """Find the hidden states ``[batch, length, hidden]`` among the arguments of a layer."""
    for each in arguments:
        if isinstance(each, mx.array) and each.ndim == 3:
            return each
    raise NotOnThisStage("hidden states")


class StageInput(LayerStandIn):
    """Stand-in before the first real layer: returns the hidden states that arrived, if any."""

    arrived: mx.array | None

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__(replaced)
        object.__setattr__(self, "arrived", None)

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        if self.arrived is not None:
            return self.arrived
        return _hidden_among(*arguments, *named.values())


class StageOutput(LayerStandIn):
    """Stand-in after the last real layer: keeps the hidden states for the next stage."""

    hidden: mx.array | None

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__(replaced)
        object.__setattr__(self, "hidden", None)

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        hidden = _hidden_among(*arguments, *named.values())
        object.__setattr__(self, "hidden", hidden)
        return hidden


class OutputCounter(nn.Module):
    """Wrapper of a layer that counts the values that it returns."""

    returned_values: int

    def __init__(self, watched: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "watched", watched)
        object.__setattr__(self, "returned_values", 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["watched"], name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result = self.__dict__["watched"](*arguments, **named)
        if isinstance(result, tuple | list):
            object.__setattr__(self, "returned_values", len(result))
        return result


class EmbeddingStandIn(nn.Module):
    """Stand-in for an embedding of another stage: returns zeros of the right shape and type."""

    def __init__(self, width: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.zeros((*tokens.shape, self.width), dtype=self.dtype)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """Return the input: this stage does not have the tied head either."""
        return hidden


class IdentityStandIn(nn.Module):
    """Stand-in for a norm or a head of another stage: returns its input."""

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden


def _first_experts(block: Any, x: mx.array) -> mx.array:
    """Stand in for the forward code of DBRX's experts; hidden states in and out."""
    gates = mx.softmax(block.router(x).astype(mx.float32), axis=-1).astype(x.dtype)
    chosen = range(block.num_experts_per_tok)
    return sum((block.experts[e](x) * gates[..., e : e + 1] for e in chosen), mx.zeros_like(x))


@contextlib.contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Let a model's forward code compute nothing, whatever values it would read.

    mlx-lm's DBRX chooses experts in Python, from the values of the router: a lazy run would compute
    all layers before, with weights that a trace does not have. While it is traced, and while a rank
    cuts it, each token takes the first experts: shapes, bytes and caches are the same.
    """
    module = sys.modules[type(model).__module__]
    block = getattr(module, "SparseMoeBlock", None)
    if block is None or not module.__name__.endswith(".dbrx"):
        yield
        return
    original = block.__call__
    block.__call__ = _first_experts
    try:
        yield
    finally:
        block.__call__ = original
