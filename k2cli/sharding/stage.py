"""Pipeline stages for any decoder-layer model of mlx-lm, by what is left out of it.

A stage is the whole model, as mlx-lm built it, in which the layers of other stages are replaced
by layers that do nothing, the embedding by zeros where no token is embedded, and norm and head by
the identity where no token is sampled. The model's own forward code runs unchanged, so masks,
layer types and cache kinds are its own business. Two of the replaced layers have a job: the one
just before the first real layer hands in the hidden states that arrived from the stage before,
the one just after the last real layer keeps those that must depart to the next.

Nothing real is wrapped, so the parameters keep the names that they have in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import UsageError
from k2cli.sharding.architectures import models_module


class AbsentLayer(nn.Module):
    """A decoder layer that another stage holds: passes hidden states through.

    It answers for the plain attributes of the layer that it replaces (``use_sliding``,
    ``is_linear``), because the model's forward code may ask for them.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        for name, value in vars(replaced).items():
            if isinstance(value, bool | int | float | str) and not name.startswith("_"):
                setattr(self, name, value)

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden


class ArrivalLayer(AbsentLayer):
    """Replaces the hidden states by those that arrived: ``[batch, length, hidden]``."""

    arrived: mx.array | None

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__(replaced)
        object.__setattr__(self, "arrived", None)

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden if self.arrived is None else self.arrived


class DepartureLayer(AbsentLayer):
    """Keeps the hidden states that go to the next stage: ``[batch, length, hidden]``."""

    departing: mx.array | None

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__(replaced)
        object.__setattr__(self, "departing", None)

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        object.__setattr__(self, "departing", hidden)
        return hidden


class AbsentEmbedding(nn.Module):
    """Stands for an embedding that another stage holds: zeros of the right shape and type."""

    def __init__(self, width: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.zeros((*tokens.shape, self.width), dtype=self.dtype)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied head, which this stage does not have either."""
        return hidden


class AbsentModule(nn.Module):
    """Stands for a norm or a head that another stage holds: the identity."""

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where a model keeps its decoder layers, and what stands around them.

    ``spine`` are the modules from the model down to the one that holds the list of layers;
    ``layers_path`` is that list's dotted name. ``embeddings`` and ``outputs`` are (parent,
    attribute) of the modules that only the first and only the last stage needs; ``tied`` says
    that the embedding also is the head.
    """

    spine: tuple[nn.Module, ...]
    layers_path: str
    layers: list[nn.Module]
    embeddings: tuple[tuple[nn.Module, str], ...]
    outputs: tuple[tuple[nn.Module, str], ...]
    tied: bool


_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_LINEARS = (nn.Linear, nn.QuantizedLinear)


def _find_layers(model: nn.Module) -> tuple[tuple[nn.Module, ...], tuple[str, ...]]:
    """The spine and the names along it to the list of decoder layers.

    That list is the one least deep in the model (``layers`` of most, ``h`` of some); experts and
    other lists are inside layers.
    """
    level: list[tuple[tuple[nn.Module, ...], tuple[str, ...]]] = [((model,), ())]
    while level:
        deeper = []
        found: list[tuple[int, tuple[nn.Module, ...], tuple[str, ...]]] = []
        for spine, names in level:
            for name, child in spine[-1].children().items():
                if isinstance(child, nn.Module):
                    deeper.append(((*spine, child), (*names, name)))
                elif isinstance(child, list) and child and isinstance(child[0], nn.Module):
                    found.append((len(child), spine, (*names, name)))
        if found:
            _, spine, names = max(found, key=lambda entry: entry[0])
            return spine, names
        level = deeper
    raise UsageError(
        f"{type(model).__module__.rpartition('.')[2]} has no list of decoder layers, "
        "so it cannot be cut into pipeline stages",
        "use --parallel tensor or a single node",
    )


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a decoder-layer model.

    Raises:
        UsageError: if it has no list of decoder layers.
    """
    spine, names = _find_layers(model)
    embeddings: list[tuple[nn.Module, str]] = []
    outputs: list[tuple[nn.Module, str]] = []
    for depth, parent in enumerate(spine):
        for name, child in parent.children().items():
            if name == names[depth] or not isinstance(child, nn.Module):
                continue
            (embeddings if isinstance(child, _EMBEDDINGS) else outputs).append((parent, name))
    tied = not any(isinstance(parent[name], _LINEARS) for parent, name in outputs)
    layers = spine[-1][names[-1]]
    return Anatomy(spine, ".".join(names), layers, tuple(embeddings), tuple(outputs), tied)


def hidden_at(model: nn.Module, layer: int) -> tuple[int, mx.Dtype]:
    """Width and dtype of the hidden states that enter a layer, by a lazy trial with one token."""
    layers = anatomy(model).layers
    original = layers[layer]
    probe = DepartureLayer(original)
    layers[layer] = probe
    try:
        model(mx.zeros((1, 1), dtype=mx.int32), cache=make_cache(model))
    finally:
        layers[layer] = original
    if not isinstance(probe.departing, mx.array) or probe.departing.ndim != 3:
        raise UsageError(
            f"the layers of {type(model).__module__.rpartition('.')[2]} exchange more than one "
            "array of hidden states, so it cannot be cut into pipeline stages",
            "use --parallel tensor or a single node",
        )
    return probe.departing.shape[-1], probe.departing.dtype


def make_cache(model: nn.Module) -> list[Any]:
    """A fresh cache entry per decoder layer, of the kinds that the model wants."""
    entries: list[Any] = models_module("cache").make_prompt_cache(model)
    return entries


@dataclass(slots=True)
class Stage:
    """One pipeline stage, or the whole model: what a rank computes with.

    ``first`` and ``past_last`` bound its decoder layers. ``width`` and ``dtype`` are those of the
    hidden states that arrive (0 on the first stage, where none do).
    """

    model: nn.Module
    first: int
    past_last: int
    layer_count: int
    width: int
    dtype: mx.Dtype
    arrival: ArrivalLayer | None = None
    departure: DepartureLayer | None = None
    _kinds: list[Any] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """Embeds tokens."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Computes logits."""
        return self.past_last == self.layer_count

    def local(self, cache: Sequence[Any]) -> Sequence[Any]:
        """The entries of a cache that this stage fills."""
        return cache[self.first : self.past_last]

    def make_local_cache(self) -> list[Any]:
        """Fresh entries for one sequence, of the layers that this stage holds."""
        return make_cache(self.model)[self.first : self.past_last]

    def make_cache(self) -> list[Any]:
        """A cache for one sequence, with an entry for every layer of the model."""
        return self.complete(self.make_local_cache())

    def complete(self, local: Sequence[Any]) -> list[Any]:
        """Local cache entries, with entries for the absent layers, which only lend their masks.

        The model builds its masks from the cache of some layer of each kind, which may be an
        absent one. So an absent layer's entry is that of a local layer of the same kind.
        """
        if self.past_last - self.first == self.layer_count:
            return list(local)
        if not self._kinds:
            self._kinds = [type(entry) for entry in make_cache(self.model)]
        lenders = dict(zip(self._kinds[self.first : self.past_last], local, strict=True))
        before = [lenders.get(kind) for kind in self._kinds[: self.first]]
        after = [lenders.get(kind) for kind in self._kinds[self.past_last :]]
        return [*before, *local, *after]

    @property
    def has_plain_caches(self) -> bool:
        """Whether every layer of the whole model keeps plain keys and values.

        Only those can be cut back to any earlier token.
        """
        plain = models_module("cache").KVCache
        return all(type(entry) is plain for entry in make_cache(self.model))

    @property
    def can_batch(self) -> bool:
        """Whether caches of several sequences can be merged, in every layer of the model."""
        return all(hasattr(entry, "merge") for entry in make_cache(self.model))

    def forward(
        self, tokens: mx.array, cache: list[Any], arrived: mx.array | None = None
    ) -> mx.array:
        """Run the stage, lazily.

        Args:
            tokens: int32 ``[batch, length]``; only its shape matters where not first.
            cache: from ``make_cache``; updated.
            arrived: hidden states ``[batch, length, width]`` unless this stage is the first.

        Returns:
            Logits ``[batch, length, vocabulary]`` on the last stage, else hidden states.
        """
        if self.arrival is not None:
            object.__setattr__(self.arrival, "arrived", arrived)
        output: mx.array = self.model(tokens, cache=cache)
        if self.arrival is not None:
            object.__setattr__(self.arrival, "arrived", None)
        if self.departure is not None:
            departing = self.departure.departing
            object.__setattr__(self.departure, "departing", None)
            assert departing is not None
            return departing
        return output


def cut_stage(model: nn.Module, first: int, past_last: int) -> Stage:
    """Cut a model, in place and lazily, to the layers ``[first, past_last)`` and what they need.

    Raises:
        UsageError: if the model cannot be cut into stages.
    """
    parts = anatomy(model)
    count = len(parts.layers)
    if not 0 <= first < past_last <= count:
        raise ValueError(f"layers {first}..{past_last} of {count}")
    width, dtype = hidden_at(model, first) if first else (0, mx.float32)
    stage = Stage(model, first, past_last, count, width, dtype)
    for index in (*range(first), *range(past_last, count)):
        replaced = parts.layers[index]
        if index == first - 1:
            parts.layers[index] = stage.arrival = ArrivalLayer(replaced)
        elif index == past_last:
            parts.layers[index] = stage.departure = DepartureLayer(replaced)
        else:
            parts.layers[index] = AbsentLayer(replaced)
    if not stage.is_first:
        _remove_embeddings(parts, keep_token_embedding=stage.is_last and parts.tied)
    if not stage.is_last:
        for parent, name in parts.outputs:
            parent[name] = AbsentModule()
    return stage


def _remove_embeddings(parts: Anatomy, *, keep_token_embedding: bool) -> None:
    """Drop the embeddings; the largest stays where it is the head too."""
    modules = [parent[name] for parent, name in parts.embeddings]
    largest = max(modules, key=lambda module: int(module.weight.size), default=None)
    for (parent, name), module in zip(parts.embeddings, modules, strict=True):
        if keep_token_embedding and module is largest:
            continue
        sample = module(mx.zeros((1, 1), dtype=mx.int32))
        parent[name] = AbsentEmbedding(sample.shape[-1], sample.dtype)
