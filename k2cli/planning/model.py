"""The model to plan, as its config and its checkpoint's headers describe it.

No other part of planning reads the model's files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from k2cli.choices import Certainty, FloatType
from k2cli.errors import K2Error
from k2cli.planning.config_check import check_config
from k2cli.planning.memory.prefill import ActivationShape, shape_of_model
from k2cli.planning.memory.stored import stored_bytes_of_config
from k2cli.sharding.recipe import Recipe, obstacle_to_quantizing

if TYPE_CHECKING:
    import mlx.nn as nn

    from k2cli.models.checkpoint import Checkpoint
    from k2cli.sharding.trace import StoredShapes
    from k2cli.sharding.weights_and_cache import ModelFacts

ITEM_BYTES: dict[FloatType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_FLOATS: dict[str, FloatType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class ModelToPlan:
    """The model before it is placed; ``stored`` is None if only its config is known.

    ``warnings`` say what is wrong with its files although it can be planned.
    """

    reference: str
    config: dict[str, Any]
    stored: StoredShapes | None
    stored_bytes: int
    stored_mark: Certainty
    facts: ModelFacts
    shape: ActivationShape
    warnings: tuple[str, ...] = ()

    @property
    def float_type(self) -> FloatType:
        """The float type of the config, else the one that most stored tensors have."""
        text = self.config.get("text_config") or {}
        for source in (self.config, text):
            name = source.get("torch_dtype") or source.get("dtype")
            for dtype in ITEM_BYTES:
                if name in (dtype, f"torch.{dtype}"):
                    return dtype
        stored = [name for name, _ in (self.stored or {}).values() if name in _STORED_FLOATS]
        return _STORED_FLOATS[max(set(stored), key=stored.count)] if stored else "bfloat16"


def read_model(reference: str, quantize: str | None = None) -> ModelToPlan:
    """Read a model's config and headers, if there are any, and trace its facts.

    Args:
        quantize: a recipe such as ``4bit``, to plan the checkpoint that ``k2 quantize`` would make.

    Raises:
        UsageError: if the reference or the config is not valid.
        K2Error: if files cannot be read or contradict each other.
    """
    from k2cli.models.inspection import inspect_model
    from k2cli.sharding.model_errors import naming_folder
    from k2cli.sharding.recipe import parse_recipe

    checkpoint = inspect_model(reference)
    with naming_folder(checkpoint.folder):
        model = _model_of(reference, checkpoint)
    return model if quantize is None else quantized_model(model, parse_recipe(quantize))


def _model_of(reference: str, checkpoint: Checkpoint) -> ModelToPlan:
    from k2cli.sharding.architectures import model_classes
    from k2cli.sharding.trace import running_model
    from k2cli.sharding.weights_and_cache import model_facts

    config = checkpoint.config
    _, arguments = model_classes(config)
    names = _argument_names(arguments, config)
    check_config(config, str(checkpoint.folder / "config.json"), names)
    stored: StoredShapes | None = {
        name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()
    } or None
    facts = model_facts(config, stored)
    mark: Certainty = "exact"
    if stored is None:
        stored_bytes, mark = stored_bytes_of_config(config, facts.model)
    else:
        stored_bytes, stored = checkpoint.stored_bytes, _as_loaded(facts.model, stored)
    with running_model(config, "traced"):
        shape = shape_of_model(config, facts.model)
    return ModelToPlan(
        reference, config, stored, stored_bytes, mark, facts, shape, checkpoint.warnings
    )


def _argument_names(arguments: type[Any], config: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields of an architecture's arguments, with those of a nested text model."""
    if not is_dataclass(arguments):
        return frozenset()
    names = {field.name for field in fields(arguments)}
    nested = config.get("text_config")
    if "text_config" in names and isinstance(nested, Mapping):
        names |= {"kv_lora_rank"} & nested.keys()
    return frozenset(names)


def _as_loaded(model: nn.Module, stored: StoredShapes) -> StoredShapes:
    """Return the shapes under the names that loading gives them, so that they are renamed once.

    Loading turns the 139,583 tensors of K2's original into 2,000; without this, every placement
    that is tried would stack the experts again.
    """
    loaded = shapes_of(model)
    return stored if loaded.keys() == stored.keys() else loaded


def shapes_of(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Describe a traced model's parameters in the form of a checkpoint's headers."""
    from mlx.utils import tree_flatten

    from k2cli.sharding.trace import STORED_TYPES

    names = {dtype: name for name, dtype in STORED_TYPES.items() if not name.startswith("F8")}
    names |= {STORED_TYPES["F32"]: "F32", STORED_TYPES["U8"]: "U8"}
    return {
        name: (names[value.dtype], value.shape) for name, value in tree_flatten(model.parameters())
    }


def quantize_command(model: str, recipe: Recipe | str) -> str:
    """Return the command that makes the quantized checkpoint."""
    return f"k2 quantize {shlex.quote(model)} --to FOLDER --recipe {shlex.quote(str(recipe))}"


def quantized_model(model: ModelToPlan, recipe: Recipe) -> ModelToPlan:
    """Return the model that ``k2 quantize`` would make.

    Raises:
        K2Error: if ``k2 quantize`` would refuse it.
    """
    import mlx.core as mx

    from k2cli.sharding.recipe import cast_to_conversion_type, quantize_lazily
    from k2cli.sharding.trace import trace_model
    from k2cli.sharding.weights_and_cache import model_facts

    obstacle = obstacle_to_quantizing(model.config)
    if obstacle is not None:
        raise K2Error(
            f"{model.reference} cannot be quantized: it is {obstacle}",
            "name the original, unquantized model",
        )
    traced = trace_model(model.config, model.stored)
    cast_to_conversion_type(model.config, traced)
    _, overrides = quantize_lazily(traced, recipe)
    config = _without_original_quantization(model.config)
    config["quantization"] = {**recipe.settings, **overrides}
    shapes = shapes_of(traced)
    stored_bytes = sum(value.nbytes for value in _leaves(traced))
    mx.clear_cache()
    facts = replace(model_facts(config, shapes), parameter_count=model.facts.parameter_count)
    return replace(
        model, config=config, stored=shapes, stored_bytes=stored_bytes, facts=facts,
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
