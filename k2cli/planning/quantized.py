"""A model as ``k2 quantize`` would write it: planned before the hours that writing takes.

The rule is that of the conversion (``quantization/source.py``), which is mlx-lm's own: every module
that can be quantized, whose rows divide into groups, and that the model does not except. Applied to
the lazily traced model it gives the shapes of the new checkpoint's tensors, to the byte.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error, UsageError
from k2cli.planning.stored import describe_quantization, original_quantization
from k2cli.planning.subject import Subject, shapes_of

if TYPE_CHECKING:
    import mlx.nn as nn

BITS = (8, 6, 5, 4, 3, 2)
"""Bits per weight that MLX has kernels for, most first."""

_GROUP_SIZES = (32, 64, 128)
_PATTERN = re.compile(r"(\d{1,3})(?:-?bits?)?(?:-g(?:roup-?)?(\d{1,4}))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class UniformRecipe:
    """The same affine quantization for everything that can have one."""

    bits: int
    group_size: int = 64

    def __str__(self) -> str:
        return f"{self.bits}bit" + ("" if self.group_size == 64 else f"-g{self.group_size}")

    @property
    def bits_per_weight(self) -> float:
        """With scale and bias of a group, 16 bits each."""
        return self.bits + 32 / self.group_size


def parse_recipe(text: str) -> UniformRecipe:
    """Read ``4bit``, ``4`` or ``4bit-g32``.

    Raises:
        UsageError: if it is no recipe, or one that MLX has no kernels for.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--quantize '{text}' is no recipe", "write for example 4bit or 4bit-g32")
    bits, group_size = int(match.group(1)), int(match.group(2) or 64)
    if bits not in BITS:
        options = ", ".join(map(str, sorted(BITS)))
        raise UsageError(f"--quantize '{text}': {bits} bits are not possible", f"one of {options}")
    if group_size not in _GROUP_SIZES:
        options = ", ".join(map(str, _GROUP_SIZES))
        raise UsageError(
            f"--quantize '{text}': groups of {group_size} are not possible", f"one of {options}"
        )
    return UniformRecipe(bits, group_size)


def quantize_command(model: str, recipe: UniformRecipe) -> str:
    """The command that makes the checkpoint."""
    return (
        f"k2 quantize {shlex.quote(model)} --to FOLDER --bits {recipe.bits} "
        f"--group-size {recipe.group_size}"
    )


def obstacle_to_quantizing(config: Mapping[str, Any]) -> str | None:
    """Why ``k2 quantize`` would refuse a checkpoint, or None: it must be of floats, or of fp8."""
    original = original_quantization(config)
    if config.get("quantization") is None and (
        original is None or original.get("quant_method") == "fp8"
    ):
        return None
    return f"it is already quantized ({describe_quantization(config)})"


def quantized_subject(subject: Subject, recipe: UniformRecipe) -> Subject:
    """The subject that the converted checkpoint would be.

    Raises:
        K2Error: if ``k2 quantize`` would refuse it.
    """
    import mlx.core as mx

    from k2cli.sharding.assemble import FLOAT_TYPES, cast
    from k2cli.sharding.footprint import model_facts
    from k2cli.sharding.trace import trace_model

    obstacle = obstacle_to_quantizing(subject.config)
    if obstacle is not None:
        raise K2Error(
            f"{subject.reference} cannot be quantized: {obstacle}",
            "name the original, unquantized model",
        )
    model = trace_model(subject.config, subject.stored)
    name = subject.config.get("torch_dtype")
    if isinstance(name, str) and name in FLOAT_TYPES:
        cast(model, FLOAT_TYPES[name])
    overrides = _quantize(model, recipe)
    quantization = {"group_size": recipe.group_size, "bits": recipe.bits, "mode": "affine"}
    kept = {key: value for key, value in subject.config.items() if key != "quantization_config"}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        kept["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    config = {**kept, "quantization": {**quantization, **overrides}}
    shapes = shapes_of(model)
    stored_bytes = sum(value.nbytes for value in _leaves(model))
    mx.clear_cache()
    facts = replace(model_facts(config, shapes), parameter_count=subject.facts.parameter_count)
    return replace(
        subject, config=config, stored=shapes, stored_bytes=stored_bytes, facts=facts,
        stored_mark="exact",
    )  # fmt: skip


def _leaves(model: nn.Module) -> list[Any]:
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.parameters())]


def _quantize(model: nn.Module, recipe: UniformRecipe) -> dict[str, dict[str, Any]]:
    """Quantize lazily, in place; what differs from the recipe, by module."""
    import mlx.nn as nn

    of_model = getattr(model, "quant_predicate", None)
    overrides: dict[str, dict[str, Any]] = {}

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % recipe.group_size:
            return False
        decision: bool | dict[str, Any] = of_model(path, module) if of_model else True
        if isinstance(decision, dict):
            overrides[path] = decision
        return decision

    nn.quantize(model, recipe.group_size, recipe.bits, class_predicate=predicate)
    return overrides
