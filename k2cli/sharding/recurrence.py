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

Kind = Literal["blocks", "steps", "expanded steps", "delta", "wkv", "linear", "scan", "convolution"]
# Kind, heads, width of the heads together, state per element of it, groups of heads.
_Call = tuple[Kind, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The recurrent layers of a model; all have the same shape.

    ``kind`` is ``blocks`` for Mamba-2, computed in blocks of 256 tokens with an array of all pairs;
    ``steps`` for Mamba, token by token; ``expanded steps`` for Jamba's, which makes the states of
    all tokens first; ``delta`` for gated delta rules (Qwen3-Next, Kimi Linear); ``wkv`` for RWKV-7;
    ``linear`` for linear attention with a decay per head (lightning attention: Ling);
    ``scan`` for RecurrentGemma's gated unit; ``convolution`` for a short convolution alone (LFM2).
    ``inner`` is the width of a token's heads together, ``convolved`` that of the convolution's
    input, ``projected`` that of the largest projection. ``keeps_input`` is true if the state of
    the convolution is a view that keeps its whole input in memory. ``before_attention`` is the
    number of recurrent layers before the last one with keys and values; ``in_parallel`` is true if
    one layer has both (Falcon-H1), ``apart`` if feed-forward parts are layers of their own
    (Nemotron-H). ``repeats_groups`` is true if several heads, but not all, share what they read
    (B and C of Mamba-2), which is then copied for each of them.
    """

    kind: Kind
    layers: int
    heads: int
    inner: int
    state_size: int
    convolved: int
    projected: int
    keeps_input: bool = True
    before_attention: int = 0
    in_parallel: bool = False
    apart: bool = False
    repeats_groups: bool = False

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
    cache = make_cache(model)
    if not mixers and all(map(_has_keys, cache)):
        return None, True
    calls: list[_Call] = []
    with trace.lazily(model), _recorded(model, calls):
        model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    states = [entry for entry in cache if not _has_keys(entry) and _short_states(entry)]
    if not calls and not mixers:
        calls = [("convolution", 1, *_widest(entry), 1) for entry in states]
    if not calls:
        return None, True
    kind, heads, inner, state, groups = max(calls, key=lambda call: call[2] * call[3])
    recurrence = Recurrence(
        kind=kind,
        layers=len(calls),
        heads=heads,
        inner=inner,
        state_size=state,
        convolved=max(map(_convolved, mixers), default=max(map(_short_width, states), default=0)),
        projected=max(map(_projected, mixers), default=0),
        keeps_input=kind != "delta",
        before_attention=_before_attention(cache),
        apart=len(getattr(model, "layers", ())) > len(cache),
        in_parallel=any(_attends(entry) and _has_state(entry) for entry in cache),
        repeats_groups=1 < groups < heads,
    )
    return recurrence, any(_attends(entry) for entry in cache)


def _has_keys(entry: Any) -> bool:
    return any(hasattr(part, "keys") for part in getattr(entry, "caches", (entry,)))


def _short_states(entry: Any) -> list[mx.array]:
    """List the states of one cache that hold the last inputs: ``[rows, tokens, width]``."""
    held = getattr(entry, "cache", ())
    return [each for each in held if isinstance(each, mx.array) and each.ndim == 3]


def _short_width(entry: Any) -> int:
    return sum(int(each.shape[-1]) for each in _short_states(entry))


def _widest(entry: Any) -> tuple[int, int]:
    """Return the width and the tokens of a cache's widest state."""
    widest = max(_short_states(entry), key=lambda each: each.shape[-1])
    return int(widest.shape[-1]), int(widest.shape[1])


def _has_state(entry: Any) -> bool:
    return any(not hasattr(part, "keys") for part in getattr(entry, "caches", (entry,)))


def _before_attention(cache: list[Any]) -> int:
    """Count the recurrent layers before the last one with keys and values, itself included."""
    last = max((at for at, entry in enumerate(cache) if _attends(entry)), default=-1)
    return sum(_has_state(entry) for entry in cache[: last + 1])


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
def _recorded(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Record the kind and the shape of every recurrence that is called."""

    def of_blocks(x: mx.array, A_log: mx.array, B: mx.array, *_: Any, **__: Any) -> None:
        calls.append(("blocks", x.shape[2], x.shape[2] * x.shape[3], B.shape[-1], B.shape[2]))

    def of_delta(q: mx.array, k: mx.array, v: mx.array, *_: Any, **__: Any) -> None:
        calls.append(("delta", v.shape[2], v.shape[2] * v.shape[3], k.shape[-1], 1))

    def of_steps(mixer: Any, x: mx.array, A: mx.array, *_: Any, **__: Any) -> None:
        kind: Kind = "steps" if x.ndim == 2 else "expanded steps"
        calls.append((kind, 1, *A.shape, 1))  # type: ignore[arg-type]

    def of_wkv(mixer: Any, r: mx.array, *_: Any) -> None:
        calls.append(("wkv", r.shape[2], r.shape[2] * r.shape[3], r.shape[3], 1))

    def of_linear(q: mx.array, k: mx.array, v: mx.array, *_: Any, **__: Any) -> None:
        calls.append(("linear", v.shape[1], v.shape[1] * v.shape[3], k.shape[-1], 1))

    def of_scan(x: mx.array, *_: Any, **__: Any) -> None:
        calls.append(("scan", 1, x.shape[-1], 1, 1))

    functions = {
        "ssm_update": of_blocks, "gated_delta_update": of_delta, "recurrent_gla": of_linear,
        "rnn_scan": of_scan,
    }  # fmt: skip
    kinds = {type(module) for module in model.modules()}
    with contextlib.ExitStack() as stack:
        for file in {sys.modules[kind.__module__] for kind in kinds}:
            for name, observe in functions.items():
                stack.enter_context(_observed(file, name, observe))
        for kind in kinds:
            stack.enter_context(_observed(kind, "ssm_step", of_steps))
            stack.enter_context(_observed(kind, "_wkv7", of_wkv))
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
