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

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import UsageError
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.sharding.architectures import MODEL_FAILURES
from k2cli.sharding.stand_ins import (
    AbsentEmbedding,
    AbsentLayer,
    AbsentModule,
    ArrivalLayer,
    DepartureLayer,
    NotHeldHere,
    WitnessLayer,
)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where a model keeps its decoder layers, and what stands around them.

    ``spine`` are the modules from the model down to the one that holds the list of layers;
    ``layers_path`` is that list's dotted name. ``embeddings`` and ``outputs`` are (parent,
    attribute) of the modules that only the first and only the last stage needs; ``tied`` says
    that the embedding also is the head. A module that holds nothing but embeddings is one.
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
            (embeddings if _is_embedding(child) else outputs).append((parent, name))
    rows = {module.weight.shape[0] for parent, name in embeddings
            for module in parent[name].modules() if isinstance(module, _EMBEDDINGS)}  # fmt: skip
    tied = not any(_is_head(parent[name], rows) for parent, name in outputs)
    layers = spine[-1][names[-1]]
    return Anatomy(spine, ".".join(names), layers, tuple(embeddings), tuple(outputs), tied)


def _is_embedding(module: nn.Module) -> bool:
    """An embedding, or a module around one (phixtral's ``embd``)."""
    holding = [each for each in module.modules() if any(map(_is_array, each.values()))]
    return bool(holding) and all(isinstance(each, _EMBEDDINGS) for each in holding)


def _is_array(value: object) -> bool:
    return isinstance(value, mx.array)


def _is_head(module: nn.Module, rows: set[int]) -> bool:
    """A linear layer, or a module around one that is as high as an embedding (its own head)."""
    return isinstance(module, _LINEARS) or any(
        isinstance(each, _LINEARS) and each.weight.shape[0] in rows for each in module.modules()
    )


def embedding_size(module: nn.Module) -> int:
    """Elements of an embedding, or of those that a module holds."""
    return sum(int(each.weight.size) for each in module.modules() if isinstance(each, _EMBEDDINGS))


def hidden_at(model: nn.Module, layer: int) -> tuple[int, mx.Dtype]:
    """Width and dtype of the hidden states that enter a layer, by a lazy trial with one token.

    Raises:
        UsageError: if more than hidden states passes from layer to layer, so that a pipeline
            cannot be cut there; it says what.
    """
    layers = anatomy(model).layers
    original = layers[layer]
    probe = DepartureLayer(original)
    cause: BaseException | None = None
    try:
        _try_with(model, layer, probe)
    except MODEL_FAILURES as error:
        cause = error
    departing = probe.departing
    if cause is None and isinstance(departing, mx.array):
        return departing.shape[-1], departing.dtype
    alone = "--parallel tensor" if hasattr(model, "shard") else "--parallel single"
    raise UsageError(
        f"mlx-lm's {type(model).__module__.rpartition('.')[2]} cannot be cut into pipeline stages "
        f"before layer {layer}: {_what_else_passes(model, layer, cause)}",
        f"use {alone}",
    ) from cause


def _try_with(model: nn.Module, layer: int, stand_in: nn.Module) -> None:
    """Run one token lazily with a layer replaced."""
    layers = anatomy(model).layers
    original = layers[layer]
    layers[layer] = stand_in
    try:
        model(mx.zeros((1, 1), dtype=mx.int32), cache=make_cache(model))
    finally:
        layers[layer] = original


def _what_else_passes(model: nn.Module, layer: int, cause: BaseException | None) -> str:
    """What a layer gives to the rest of its model beside one array of hidden states."""
    if isinstance(cause, NotHeldHere):
        return (
            f"the model reads {cause} of its layers, which a rank does not have of those that "
            "another one holds"
        )
    witness = WitnessLayer(anatomy(model).layers[layer])
    with contextlib.suppress(*MODEL_FAILURES):
        _try_with(model, layer, witness)
    if witness.handed_on > 1:
        return (
            f"each layer hands {witness.handed_on} values on to the next, where k2's stages "
            "exchange one array of hidden states"
        )
    return (
        "later layers use more of it than its hidden states (keys and values, for one), which "
        "k2's stages do not exchange"
    )


def make_cache(model: nn.Module) -> list[Any]:
    """A fresh cache entry per decoder layer, of the kinds that the model wants."""
    entries: list[Any] = mlx_lm_module("models.cache").make_prompt_cache(model)
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
        """The entries of a cache that this stage fills.

        They are the layers' own in a pipeline. A whole model has all of them, and may have more
        than layers: longcat_flash_ngram keeps one for its embedding, iquestloopcoder two a layer.
        """
        return cache if self.is_first and self.is_last else cache[self.first : self.past_last]

    def make_local_cache(self) -> list[Any]:
        """Fresh entries for one sequence, of the layers that this stage holds."""
        return list(self.local(make_cache(self.model)))

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
        plain = mlx_lm_module("models.cache").KVCache
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
    largest = max(modules, key=embedding_size, default=None)
    for (parent, name), module in zip(parts.embeddings, modules, strict=True):
        if keep_token_embedding and module is largest:
            continue
        sample = module(mx.zeros((1, 1), dtype=mx.int32))
        parent[name] = AbsentEmbedding(sample.shape[-1], sample.dtype)
