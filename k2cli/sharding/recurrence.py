"""Recurrent layers of a model: state-space (Mamba) and linear attention, found by a lazy run.

Such a layer keeps a state of fixed size in place of keys and values. The kind decides what it
computes for a chunk of a prompt, and so its memory (``planning/memory/recurrent.py``). The kinds
follow from the functions of mlx-lm that the model calls and from the parameters of its modules,
never from names in its config.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from k2cli.sharding import trace
from k2cli.sharding.stage import make_cache

Kind = Literal["blocks", "steps", "expanded steps", "delta"]


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The recurrent layers of a model; all have the same shape.

    ``kind`` is ``blocks`` for Mamba-2, computed in blocks of 256 tokens with an array of all pairs;
    ``steps`` for Mamba, token by token; ``expanded steps`` for Jamba's, which makes the states of
    all tokens first; ``delta`` for gated delta rules (Qwen3-Next, Kimi Linear).
    ``inner`` is the width of a token's heads together, ``convolved`` that of the convolution's
    input, ``projected`` that of the largest projection. ``keeps_input`` is true if the state of
    the convolution is a view that keeps its whole input in memory.
    """

    kind: Kind
    layers: int
    heads: int
    inner: int
    state_size: int
    convolved: int
    projected: int
    keeps_input: bool = True

    @property
    def state_elements(self) -> int:
        """Elements of the state of one layer and sequence."""
        return self.inner * self.state_size


def recurrence_of(model: nn.Module) -> tuple[Recurrence | None, bool]:
    """Find the recurrent layers of a lazily assembled model.

    Returns:
        Them, or None, and whether any layer attends to earlier tokens.
    """
    mixers = [module for module in model.modules() if isinstance(module.get("A_log"), mx.array)]
    if not mixers:
        return None, True
    cache = make_cache(model)
    calls: list[tuple[Kind, int, int, int]] = []
    with trace.without_collectives(), _recorded(mixers, calls):
        model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    if not calls:
        return None, True
    kind, heads, inner, state = max(calls, key=lambda call: call[2] * call[3])
    recurrence = Recurrence(
        kind=kind,
        layers=len(calls),
        heads=heads,
        inner=inner,
        state_size=state,
        convolved=max(map(_convolved, mixers)),
        projected=max(map(_projected, mixers)),
        keeps_input=kind != "delta",
    )
    return recurrence, any(_attends(entry) for entry in cache)


def _attends(entry: Any) -> bool:
    parts = getattr(entry, "caches", (entry,))
    return any(isinstance(getattr(part, "keys", None), mx.array) for part in parts)


def _convolved(mixer: nn.Module) -> int:
    return sum(int(part.weight.shape[0]) for part in mixer.modules() if isinstance(part, nn.Conv1d))


def _projected(mixer: nn.Module) -> int:
    widths = [
        int(part.weight.shape[0])
        for part in mixer.modules()
        if isinstance(part, nn.Linear | nn.QuantizedLinear)
    ]
    return max(widths, default=0)


@contextlib.contextmanager
def _recorded(mixers: list[nn.Module], calls: list[tuple[Kind, int, int, int]]) -> Iterator[None]:
    """Record the kind and the shape of every recurrence that is called."""

    def of_blocks(x: mx.array, A_log: mx.array, B: mx.array, *_: Any, **__: Any) -> None:
        calls.append(("blocks", x.shape[2], x.shape[2] * x.shape[3], B.shape[-1]))

    def of_delta(q: mx.array, k: mx.array, v: mx.array, *_: Any, **__: Any) -> None:
        calls.append(("delta", v.shape[2], v.shape[2] * v.shape[3], k.shape[-1]))

    def of_steps(mixer: Any, x: mx.array, A: mx.array, *_: Any, **__: Any) -> None:
        kind: Kind = "steps" if x.ndim == 2 else "expanded steps"
        calls.append((kind, 1, *A.shape))  # type: ignore[arg-type]

    with contextlib.ExitStack() as stack:
        for module in {sys.modules[type(mixer).__module__] for mixer in mixers}:
            stack.enter_context(_observed(module, "ssm_update", of_blocks))
            stack.enter_context(_observed(module, "gated_delta_update", of_delta))
        for kind in {type(mixer) for mixer in mixers}:
            stack.enter_context(_observed(kind, "ssm_step", of_steps))
        yield


@contextlib.contextmanager
def _observed(owner: Any, name: str, observe: Any) -> Iterator[None]:
    """Call ``observe`` with the arguments of each call of a function, if the owner has it."""
    original = vars(owner).get(name)
    if original is None:
        yield
        return

    def call(*arguments: Any, **named: Any) -> Any:
        observe(*arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)
