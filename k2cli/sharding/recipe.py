"""What to quantize to: a recipe, read from text, and applied lazily to a model.

Planning and converting share all of it, so that a checkpoint that is only planned has, to the byte,
the tensors of the one that is written. The rule is mlx-lm's own: every module that can be
quantized, whose rows divide into groups, and that the model's ``quant_predicate`` does not except.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2cli.errors import UsageError

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
"""Affine quantization: what MLX has kernels for, and mlx-lm writes."""

FIXED_MODES: Mapping[str, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Modes of floats with a scale and no bias: bits and group size, which are part of their format
(the table of modes in MLX's documentation of ``mx.quantize``)."""

MODES = ("affine", *FIXED_MODES)
_DEFAULT_BITS, _DEFAULT_GROUP_SIZE = 4, 64
_AFFINE = re.compile(r"(\d{1,3})(?:-?bits?)?(?:-g(?:roup-?)?(\d{1,4}))?", re.IGNORECASE)
_EXAMPLES = "write for example 4bit, 3bit-g32 or mxfp4"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The same quantization for every module that can have one.

    In ``affine`` each group of weights in a row shares a scale and a bias; the other modes are
    floats of a few bits that share a scale.

    Raises:
        UsageError: for bits, a group size or a mode that MLX has no kernels for.
    """

    bits: int = _DEFAULT_BITS
    group_size: int = _DEFAULT_GROUP_SIZE
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"mode '{self.mode}' is not possible", f"one of {', '.join(MODES)}")
        if self.mode in FIXED_MODES:
            if (self.bits, self.group_size) != FIXED_MODES[self.mode]:
                bits, group_size = FIXED_MODES[self.mode]
                raise UsageError(
                    f"{self.mode} in {self.bits} bits and groups of {self.group_size} is not "
                    "possible",
                    f"{self.mode} is {bits} bits in groups of {group_size}",
                )
            return
        _check(f"{self.bits} bits are", self.bits, BITS)
        _check(f"groups of {self.group_size} are", self.group_size, GROUP_SIZES)

    def __str__(self) -> str:
        """As ``parse_recipe`` reads it."""
        if self.mode in FIXED_MODES:
            return self.mode
        group = "" if self.group_size == _DEFAULT_GROUP_SIZE else f"-g{self.group_size}"
        return f"{self.bits}bit{group}"

    @property
    def settings(self) -> dict[str, Any]:
        """As MLX's functions take it, and configs hold it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def _check(what: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{what} not possible", f"one of {', '.join(map(str, allowed))}")


def parse_recipe(text: str) -> Recipe:
    """Read ``4bit``, ``4``, ``4bit-g32`` or the name of a mode: ``mxfp4``, ``mxfp8``, ``nvfp4``.

    Raises:
        UsageError: if it is no recipe, or one that MLX has no kernels for.
    """
    word = text.strip().lower()
    if word in FIXED_MODES:
        return recipe_of(mode=word)
    match = _AFFINE.fullmatch(word)
    if match is None:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise UsageError(f"'{shown}' is no recipe to quantize by", _EXAMPLES)
    try:
        return Recipe(int(match.group(1)), int(match.group(2) or _DEFAULT_GROUP_SIZE))
    except UsageError as error:
        raise UsageError(f"recipe '{text}': {error.message}", error.hint) from error


def recipe_of(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine"
) -> Recipe:
    """A recipe whose bits and group size, where not given, are those that the mode goes with.

    Raises:
        UsageError: as ``Recipe``.
    """
    usual_bits, usual_group = FIXED_MODES.get(mode, (_DEFAULT_BITS, _DEFAULT_GROUP_SIZE))
    return Recipe(
        usual_bits if bits is None else bits,
        usual_group if group_size is None else group_size,
        mode,
    )


def obstacle_to_quantizing(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of this config cannot be quantized, or None.

    It has to hold floats, or fp8 that loading dequantizes: a second quantization would lose more
    and gain nothing.
    """
    own = config.get("quantization")
    if own is not None:
        return f"already quantized: {own.get('bits')} bits, group size {own.get('group_size')}"
    text = config.get("text_config") or {}
    original = config.get("quantization_config") or text.get("quantization_config") or {}
    method = original.get("quant_method")
    is_mxfp8 = (
        original.get("scale_fmt") == "ue8m0" and original.get("weight_block_size") == [32, 32]
    )  # fmt: skip
    if original and (method != "fp8" or is_mxfp8):
        name = "mxfp8" if is_mxfp8 else method or "an unknown method"
        return f"already quantized, by {name}"
    return None


def cast_to_conversion_type(config: Mapping[str, Any], model: nn.Module) -> None:
    """Cast a model lazily to the float type that it is quantized from, by mlx-lm's rule.

    Without one in the config, each tensor keeps its own.
    """
    from k2cli.sharding.assemble import FLOAT_TYPES, cast

    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    dtype: mx.Dtype | None = FLOAT_TYPES.get(name) if isinstance(name, str) else None
    if dtype is not None:
        cast(model, dtype)


def quantize_lazily(
    model: nn.Module, recipe: Recipe
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Quantize a model in place; nothing is computed.

    Returns:
        What was applied to each module, and those of them that differ from the recipe.
    """
    import mlx.nn as nn

    of_model = getattr(model, "quant_predicate", None)
    applied: dict[str, dict[str, Any]] = {}
    overrides: dict[str, dict[str, Any]] = {}

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % recipe.group_size:
            return False
        decision: bool | dict[str, Any] = of_model(path, module) if of_model else True
        if isinstance(decision, dict):
            overrides[path] = decision
            # What a model wants kept finer is affine if it does not say otherwise, as in MLX.
            applied[path] = {"mode": "affine", **decision}
        elif decision:
            applied[path] = recipe.settings
        return decision

    nn.quantize(model, recipe.group_size, recipe.bits, mode=recipe.mode, class_predicate=predicate)
    return applied, overrides
