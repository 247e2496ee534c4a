"""Pipeline stages for any decoder-layer model of mlx-lm, made by leaving parts out.

A stage is the whole model, as mlx-lm built it, in which stand-ins replace the parts of other
stages: layers that do nothing, zeros for the embedding unless the stage is the first, and the
identity for norm and head unless it is the last. The model's own forward code runs unchanged, with
its own masks, layer types and kinds of caches. Two stand-ins do more: the one just before the first
real layer returns the hidden states that arrived from the previous stage, and the one just after
the last real layer keeps those for the next stage.

Real modules are not wrapped, so the parameters keep the names that they have in the checkpoint.
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
from k2cli.sharding.kv_cache.quantized import quantized
from k2cli.sharding.stand_ins import (
    EmbeddingStandIn,
    IdentityStandIn,
    LayerStandIn,
    NotOnThisStage,
    OutputCounter,
    StageInput,
    StageOutput,
    without_values,
)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Position of a model's decoder layers, and the modules before and after them.

    ``spine`` are the modules from the model down to the one that holds the list of layers;
    ``layers_path`` is that list's dotted name. ``embeddings`` and ``outputs`` are (parent,
    attribute) of the modules that only the first and only the last stage needs; ``tied`` is True
    if the embedding is also the head. A module that holds only embeddings counts as one.
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
    """Find the spine and the names along it to the list of decoder layers.

    It is the list nearest to the model's root (``layers`` in most models, ``h`` in some); lists of
    experts and others are inside layers.
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
        "--parallel tensor, or --nodes localhost",
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
    """True for an embedding, or a module around one (phixtral's ``embd``)."""
    holding = [each for each in module.modules() if any(map(_is_array, each.values()))]
    return bool(holding) and all(isinstance(each, _EMBEDDINGS) for each in holding)


def _is_array(value: object) -> bool:
    return isinstance(value, mx.array)


def _is_head(module: nn.Module, rows: set[int]) -> bool:
    """True for a linear layer, or a module around one with as many rows as an embedding."""
    return isinstance(module, _LINEARS) or any(
        isinstance(each, _LINEARS) and each.weight.shape[0] in rows for each in module.modules()
    )


def embedding_size(module: nn.Module) -> int:
    """Count the elements of an embedding, or of all embeddings that a module holds."""
    return sum(int(each.weight.size) for each in module.modules() if isinstance(each, _EMBEDDINGS))


def hidden_at(model: nn.Module, layer: int) -> tuple[int, mx.Dtype]:
    """Find width and dtype of the hidden states that enter a layer, by a lazy run of one token.

    Raises:
        UsageError: if layers exchange more than hidden states, so that a pipeline cannot be cut
            there; the message names what they exchange.
    """
    layers = anatomy(model).layers
    original = layers[layer]
    probe = StageOutput(original)
    cause: BaseException | None = None
    try:
        _run_with(model, layer, probe)
    except MODEL_FAILURES as error:
        cause = error
    hidden = probe.hidden
    if cause is None and isinstance(hidden, mx.array):
        return hidden.shape[-1], hidden.dtype
    alone = "--parallel tensor" if hasattr(model, "shard") else "--parallel single"
    raise UsageError(
        f"mlx-lm's {type(model).__module__.rpartition('.')[2]} cannot be cut into pipeline stages "
        f"before layer {layer}: {_explain_exchange(model, layer, cause)}",
        f"use {alone}",
    ) from cause


def _run_with(model: nn.Module, layer: int, stand_in: nn.Module) -> None:
    """Run one token lazily with a layer replaced."""
    layers = anatomy(model).layers
    original = layers[layer]
    layers[layer] = stand_in
    try:
        with without_values(model):
            model(mx.zeros((1, 1), dtype=mx.int32), cache=make_cache(model))
    finally:
        layers[layer] = original


def _explain_exchange(model: nn.Module, layer: int, cause: BaseException | None) -> str:
    """Explain what a layer passes to the rest of its model beside one array of hidden states."""
    if isinstance(cause, NotOnThisStage):
        return (
            f"the model reads {cause} of its layers, which a rank does not have for the layers of "
            "another rank"
        )
    counter = OutputCounter(anatomy(model).layers[layer])
    with contextlib.suppress(*MODEL_FAILURES):
        _run_with(model, layer, counter)
    if counter.returned_values > 1:
        return (
            f"each layer passes {counter.returned_values} values to the next, but k2's stages "
            "exchange one array of hidden states"
        )
    return (
        "later layers use more of it than its hidden states, for example keys and values, which "
        "k2's stages do not exchange"
    )


def make_cache(model: nn.Module, kv_bits: int = 0) -> list[Any]:
    """Make a fresh cache entry per decoder layer, of the kinds that the model uses.

    With ``kv_bits`` plain caches of keys and values are quantized to so many bits.
    """
    entries: list[Any] = mlx_lm_module("models.cache").make_prompt_cache(model)
    return quantized(entries, kv_bits) if kv_bits else entries


@dataclass(slots=True)
class Stage:
    """One pipeline stage, or the whole model: the part with which a rank computes.

    ``first`` and ``past_last`` bound its decoder layers. ``width`` and ``dtype`` are those of the
    hidden states that arrive; ``width`` is 0 on the first stage, which receives none. ``kv_bits``
    are those of quantized caches, 0 for caches of the model's own kinds.
    """

    model: nn.Module
    first: int
    past_last: int
    layer_count: int
    width: int
    dtype: mx.Dtype
    kv_bits: int = 0
    stage_input: StageInput | None = None
    stage_output: StageOutput | None = None
    _kinds: list[Any] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """True if the stage embeds tokens."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """True if the stage computes logits."""
        return self.past_last == self.layer_count

    @property
    def last_layer(self) -> nn.Module | None:
        """The last decoder layer of this stage; None if the model has no list of layers."""
        try:
            spine, names = _find_layers(self.model)
        except UsageError:
            return None
        layer: nn.Module = spine[-1][names[-1]][self.past_last - 1]
        return layer

    def local(self, cache: Sequence[Any]) -> Sequence[Any]:
        """Return the entries of a cache that this stage fills.

        In a pipeline these are the entries of its layers. A whole model has all entries, which may
        be more than its layers: longcat_flash_ngram keeps one for its embedding, iquestloopcoder
        two per layer.
        """
        return cache if self.is_first and self.is_last else cache[self.first : self.past_last]

    def make_local_cache(self) -> list[Any]:
        """Make cache entries for one sequence and the layers that this stage holds."""
        return list(self.local(make_cache(self.model, self.kv_bits)))

    def make_cache(self) -> list[Any]:
        """Make a cache for one sequence, with an entry for every layer of the model."""
        return self.complete(self.make_local_cache())

    def complete(self, local: Sequence[Any]) -> list[Any]:
        """Extend local cache entries by entries for the layers of other stages.

        The model builds its masks from the cache of one layer of each kind, which may belong to
        another stage. So the entry of such a layer is that of a local layer of the same kind.
        """
        if self.past_last - self.first == self.layer_count:
            return list(local)
        if not self._kinds:
            self._kinds = [type(entry) for entry in make_cache(self.model)]
        by_kind = dict(zip(self._kinds[self.first : self.past_last], local, strict=True))
        before = [by_kind.get(kind) for kind in self._kinds[: self.first]]
        after = [by_kind.get(kind) for kind in self._kinds[self.past_last :]]
        return [*before, *local, *after]

    @property
    def has_plain_caches(self) -> bool:
        """True if every layer of the whole model keeps plain keys and values.

        Only such caches can be cut back to any earlier token.
        """
        plain = mlx_lm_module("models.cache").KVCache
        return all(type(entry) is plain for entry in make_cache(self.model))

    @property
    def can_batch(self) -> bool:
        """True if caches of several sequences can be merged, in every layer of the model."""
        return all(hasattr(entry, "merge") for entry in make_cache(self.model))

    def forward(
        self, tokens: mx.array, cache: list[Any], arrived: mx.array | None = None
    ) -> mx.array:
        """Run the stage, lazily.

        Args:
            tokens: int32 ``[batch, length]``; only the first stage uses more than its shape.
            cache: from ``make_cache``; updated.
            arrived: hidden states ``[batch, length, width]`` unless this stage is the first.

        Returns:
            Logits ``[batch, length, vocabulary]`` on the last stage, else hidden states.
        """
        if self.stage_input is not None:
            object.__setattr__(self.stage_input, "arrived", arrived)
        output: mx.array = self.model(tokens, cache=cache)
        if self.stage_input is not None:
            object.__setattr__(self.stage_input, "arrived", None)
        if self.stage_output is not None:
            hidden = self.stage_output.hidden
            object.__setattr__(self.stage_output, "hidden", None)
            assert hidden is not None
            return hidden
        return output


def cut_stage(model: nn.Module, first: int, past_last: int) -> Stage:
    """Cut a model, in place and lazily, to the stage of the layers ``[first, past_last)``.

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
            parts.layers[index] = stage.stage_input = StageInput(replaced)
        elif index == past_last:
            parts.layers[index] = stage.stage_output = StageOutput(replaced)
        else:
            parts.layers[index] = LayerStandIn(replaced)
    if not stage.is_first:
        _remove_embeddings(parts, keep_token_embedding=stage.is_last and parts.tied)
    if not stage.is_last:
        for parent, name in parts.outputs:
            parent[name] = IdentityStandIn()
    return stage


def _remove_embeddings(parts: Anatomy, *, keep_token_embedding: bool) -> None:
    """Replace the embeddings; if asked, keep the largest, which is also the head."""
    modules = [parent[name] for parent, name in parts.embeddings]
    largest = max(modules, key=embedding_size, default=None)
    for (parent, name), module in zip(parts.embeddings, modules, strict=True):
        if keep_token_embedding and module is largest:
            continue
        sample = module(mx.zeros((1, 1), dtype=mx.int32))
        parent[name] = EmbeddingStandIn(sample.shape[-1], sample.dtype)
