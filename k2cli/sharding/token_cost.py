"""Cost of one token in each layer: the bytes read and weights multiplied, found by a lazy run.

One token goes through the traced model. Its use shows facts that the shapes of parameters do not:
the experts per token, the cache of each layer, and the collectives that a sliced model calls.
Nothing is evaluated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import UsageError
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.sharding import trace
from k2cli.sharding.architectures import MODEL_FAILURES
from k2cli.sharding.kv_cache.quantized import QuantizedCache
from k2cli.sharding.model_errors import explain_failure
from k2cli.sharding.stage import anatomy, embedding_size, make_cache
from k2cli.sharding.tensor import ShardedHead
from k2cli.sharding.weights_and_cache import cache_window


@dataclass(frozen=True, slots=True)
class CachePart:
    """Keys and values of one cache: bytes per token of context, and the window if it has one.

    ``heads`` is the number of heads whose keys are kept.
    """

    bytes_per_token: int
    window_tokens: int | None
    heads: int = 1


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Weights of one layer, or of the head, and the part of them that one token uses.

    ``dense_weights`` counts weights that every token is multiplied with, ``expert_weights`` those
    of all ``experts`` together, of which a token uses ``experts_per_token``. ``state_bytes`` is
    the size of a recurrent state, read and written for every token.
    """

    dense_bytes: int
    dense_weights: int
    expert_bytes: int = 0
    expert_weights: int = 0
    experts: int = 0
    experts_per_token: int = 0
    cache: tuple[CachePart, ...] = ()
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelTokenCost:
    """Cost of all layers and of the head (with the final norm), and collectives per token."""

    layers: tuple[TokenCost, ...]
    head: TokenCost
    collectives: int
    hidden_bytes: int


def model_token_cost(model: nn.Module, kv_bits: int = 0) -> ModelTokenCost:
    """Run one token through a whole, lazily assembled model, which may be a tensor slice.

    Args:
        kv_bits: bits of quantized caches; 0 for those of the model.

    Raises:
        UsageError: if the model has no list of decoder layers, or cannot run a token.
    """
    parts = anatomy(model)
    cache = make_cache(model, kv_bits)
    routed: dict[int, int] = {}
    calls = [0]
    try:
        with _recorded_experts(routed), _counted_collectives(model, calls):
            output = model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    except MODEL_FAILURES as error:
        name = type(model).__module__.rpartition(".")[2]
        raise UsageError(
            f"{name} could not be traced for its speed: {explain_failure(error, {})}"
        ) from error
    # If a model has not one cache per layer, no cache is attributed to a layer.
    entries = cache if len(cache) == len(parts.layers) else [None] * len(parts.layers)
    layers = tuple(
        _token_cost([layer], routed, entry)
        for layer, entry in zip(parts.layers, entries, strict=True)
    )
    outputs = [parent[name] for parent, name in parts.outputs]
    # A sharded head is no linear layer, but it is the head.
    if parts.tied and not any(isinstance(module, ShardedHead) for module in outputs):
        embeddings = [parent[name] for parent, name in parts.embeddings]
        outputs += [max(embeddings, key=embedding_size)]
    width = _hidden_width(parts.embeddings)
    return ModelTokenCost(
        layers, _token_cost(outputs, routed, None), calls[0], width * output.dtype.size
    )


def _hidden_width(embeddings: Iterable[tuple[nn.Module, str]]) -> int:
    widths = [
        parent[name](mx.zeros((1, 1), dtype=mx.int32)).shape[-1] for parent, name in embeddings
    ]
    return max(widths, default=0)


def _token_cost(modules: Iterable[nn.Module], routed: dict[int, int], entry: Any) -> TokenCost:
    dense_bytes = dense_weights = expert_bytes = expert_weights = experts = per_token = 0
    seen: set[int] = set()
    for module in (inner for outer in modules for _, inner in outer.named_modules()):
        if id(module) in seen:
            continue
        seen.add(id(module))
        held = sum(value.nbytes for value in module.values() if isinstance(value, mx.array))
        count = _weights(module)
        if id(module) in routed:
            expert_bytes += held
            expert_weights += count
            experts = max(experts, int(module["weight"].shape[0]))
            per_token = max(per_token, routed[id(module)])
        else:
            dense_bytes += held
            dense_weights += count
    cache, state = _cache_parts(entry)
    return TokenCost(
        dense_bytes, dense_weights, expert_bytes, expert_weights, experts, per_token, cache, state
    )


def _weights(module: nn.Module) -> int:
    """Count the weights of a matrix, quantized or not; norms are too small to count."""
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim < 2:
        return 0
    bits = vars(module).get("bits")
    if "scales" in module and isinstance(bits, int):
        return int(weight.size) * 32 // bits
    return int(weight.size)


def _cache_parts(entry: Any) -> tuple[tuple[CachePart, ...], int]:
    """Return a layer's caches that grow with the context, and the bytes of state that does not."""
    if entry is None:
        return (), 0
    parts = getattr(entry, "caches", None)
    if parts is not None:  # a CacheList
        inner = [_cache_parts(part) for part in parts]
        return tuple(each for cache, _ in inner for each in cache), sum(s for _, s in inner)
    if isinstance(entry, QuantizedCache):
        stored = [part.shape[1] * part.shape[3] * part.dtype.size for part in entry.arrays]
        return (CachePart(sum(stored), None, int(entry.arrays[0].shape[1])),), 0
    keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return (), int(entry.nbytes)
    per_token = sum(
        part.shape[1] * part.shape[3] * part.dtype.size for part in (keys, values) if part.ndim == 4
    )
    heads = int(keys.shape[1]) if keys.ndim == 4 else 1
    return (CachePart(per_token, cache_window(entry), heads),), 0


@contextlib.contextmanager
def _recorded_experts(routed: dict[int, int]) -> Iterator[None]:
    """Record the experts per token of every stack of experts that is called."""
    module = mlx_lm_module("models.switch_layers")
    kinds = (module.SwitchLinear, module.QuantizedSwitchLinear)
    originals = [kind.__call__ for kind in kinds]

    def recording(original: Any) -> Any:
        def call(self: nn.Module, x: mx.array, indices: mx.array, *rest: Any, **named: Any) -> Any:
            routed[id(self)] = int(indices.size)
            return original(self, x, indices, *rest, **named)

        return call

    for kind, original in zip(kinds, originals, strict=True):
        kind.__call__ = recording(original)
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = original


@contextlib.contextmanager
def _counted_collectives(model: nn.Module, calls: list[int]) -> Iterator[None]:
    """Replace collectives by stand-ins that return the shape of the result, and count them."""
    with trace.lazily(model):
        names = ("all_sum", "all_gather")
        stand_ins = [getattr(mx.distributed, name) for name in names]

        def counting(stand_in: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                calls[0] += 1
                return stand_in(*arguments, **named)

            return call

        for name, stand_in in zip(names, stand_ins, strict=True):
            setattr(mx.distributed, name, counting(stand_in))
        yield
