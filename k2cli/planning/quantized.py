"""A model as ``k2 quantize`` would write it: planned before the hours that writing takes.

Applied to the lazily traced model, the conversion's own rule (``sharding/recipe.py``) gives the
shapes of the new checkpoint's tensors, to the byte.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.planning.model import Subject, shapes_of
from k2cli.sharding.recipe import Recipe, obstacle_to_quantizing

if TYPE_CHECKING:
    import mlx.nn as nn


def quantize_command(model: str, recipe: Recipe | str) -> str:
    """The command that makes the checkpoint."""
    return f"k2 quantize {shlex.quote(model)} --to FOLDER --recipe {shlex.quote(str(recipe))}"


def quantized_subject(subject: Subject, recipe: Recipe) -> Subject:
    """The subject that the converted checkpoint would be.

    Raises:
        K2Error: if ``k2 quantize`` would refuse it.
    """
    import mlx.core as mx

    from k2cli.sharding.footprint import model_facts
    from k2cli.sharding.recipe import cast_to_conversion_type, quantize_lazily
    from k2cli.sharding.trace import trace_model

    obstacle = obstacle_to_quantizing(subject.config)
    if obstacle is not None:
        raise K2Error(
            f"{subject.reference} cannot be quantized: it is {obstacle}",
            "name the original, unquantized model",
        )
    model = trace_model(subject.config, subject.stored)
    cast_to_conversion_type(subject.config, model)
    _, overrides = quantize_lazily(model, recipe)
    config = _without_original_quantization(subject.config)
    config["quantization"] = {**recipe.settings, **overrides}
    shapes = shapes_of(model)
    stored_bytes = sum(value.nbytes for value in _leaves(model))
    mx.clear_cache()
    facts = replace(model_facts(config, shapes), parameter_count=subject.facts.parameter_count)
    return replace(
        subject, config=config, stored=shapes, stored_bytes=stored_bytes, facts=facts,
        stored_mark="exact",
    )  # fmt: skip


def _without_original_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        kept["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return kept


def _leaves(model: nn.Module) -> list[Any]:
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.parameters())]
