"""Quantization recipes: read from text, and applied lazily to a model.

Planning and converting share this module, so that the plan of a quantized checkpoint is exact to
the byte. mlx-lm's rule chooses the modules: those that can be quantized, whose rows divide into
groups, and that the model's ``quant_predicate`` does not exclude.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2cli.errors import UsageError

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
"""Sizes for affine quantization that MLX has kernels for and mlx-lm writes."""

FIXED_MODES: Mapping[str, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Modes of floats with a scale and no bias: bits and group size, which are part of their format
(the table of modes in MLX's documentation of ``mx.quantize``)."""

MODES = ("affine", *FIXED_MODES)
_DEFAULT_BITS, _DEFAULT_GROUP_SIZE = 4, 64
_AFFINE = re.compile(r"(\d{1,3})(?:-?bits?)?(?:-g(?:roup-?)?(\d{1,4}))?", re.IGNORECASE)
_MIXED_GROUP = re.compile(r"(mixed_\d_\d)(?:-g(?:roup-?)?(\d{1,4}))?", re.IGNORECASE)
_EXAMPLES = "write for example 4bit, 3bit-g32, mxfp4 or mixed_3_6"

MIXED: Mapping[str, tuple[int, int]] = {
    "mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6),
}  # fmt: skip
"""mlx-lm's mixed recipes by name (``mlx_lm.convert --quant-predicate``): the bits of most modules,
and those of the head and of values and down projections in the layers that matter most."""

_VALUE_NAMES = ("v_proj", "v_a_proj", "v_b_proj")
_Decision = bool | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One quantization for every module that can be quantized, or a mix of two.

    In ``affine`` each group of weights in a row shares a scale and a bias; the other modes are
    floats of a few bits that share a scale. ``mixed`` names one of ``MIXED``; the config then
    gives the bits of each module, and ``bits`` is only its default.

    Raises:
        UsageError: for bits, a group size or a mode that MLX has no kernels for.
    """

    bits: int = _DEFAULT_BITS
    group_size: int = _DEFAULT_GROUP_SIZE
    mode: str = "affine"
    mixed: str = ""

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
        """Format the recipe for ``parse_recipe``."""
        if self.mode in FIXED_MODES:
            return self.mode
        if self.mixed:
            return self.mixed + self._group_suffix
        return f"{self.bits}bit{self._group_suffix}"

    @property
    def _group_suffix(self) -> str:
        return "" if self.group_size == _DEFAULT_GROUP_SIZE else f"-g{self.group_size}"

    @property
    def most_bits_below(self) -> int:
        """The bound under which the bits of an unmixed recipe make it smaller than this one."""
        return MIXED[self.mixed][0] + 1 if self.mixed else self.bits

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of MLX's functions, which are also the fields in configs."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def _check(what: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{what} not possible", f"one of {', '.join(map(str, allowed))}")


def parse_recipe(text: str) -> Recipe:
    """Read ``4bit``, ``4``, ``4bit-g32`` or the name of a mode: ``mxfp4``, ``mxfp8``, ``nvfp4``.

    Raises:
        UsageError: if it is not a recipe, or MLX has no kernels for it.
    """
    word = text.strip().lower()
    if word in FIXED_MODES:
        return recipe_of(mode=word)
    mixed = _MIXED_GROUP.fullmatch(word)
    match = mixed or _AFFINE.fullmatch(word)
    if match is None or (mixed is not None and mixed[1] not in MIXED):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        hint = f"mixed recipes are {', '.join(MIXED)}" if mixed is not None else _EXAMPLES
        raise UsageError(f"'{shown}' is not a quantization recipe", hint)
    group_size = int(match[2] or _DEFAULT_GROUP_SIZE)
    try:
        if mixed is not None:
            return Recipe(group_size=group_size, mixed=mixed[1])
        return Recipe(int(match[1]), group_size)
    except UsageError as error:
        raise UsageError(f"recipe '{text}': {error.message}", error.hint) from error


def recipe_of(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine"
) -> Recipe:
    """Make a recipe with the mode's usual bits and group size unless they are given.

    Raises:
        UsageError: as ``Recipe``.
    """
    usual_bits, usual_group = FIXED_MODES.get(mode, (_DEFAULT_BITS, _DEFAULT_GROUP_SIZE))
    return Recipe(
        usual_bits if bits is None else bits,
        usual_group if group_size is None else group_size,
        mode,
    )


def chosen_recipe(
    text: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
) -> Recipe:
    """Make a recipe from ``--recipe``, or from ``--bits``, ``--group-size`` and ``--mode``.

    Raises:
        UsageError: if both are given, or MLX has no kernels for the recipe.
    """
    if text is None:
        return recipe_of(bits, group_size, mode or "affine")
    for option, value in (("--bits", bits), ("--group-size", group_size), ("--mode", mode)):
        if value is not None:
            raise UsageError(f"--recipe and {option} contradict each other", f"leave out {option}")
    return parse_recipe(text)


def obstacle_to_quantizing(config: Mapping[str, Any]) -> str | None:
    """Return the reason why a checkpoint of this config cannot be quantized, or None.

    It must hold floats, or fp8 that loading dequantizes: a second quantization would lose more
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
    """Cast a model lazily to the float type from which mlx-lm quantizes it.

    If the config names none, each tensor keeps its own.
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
        The settings of each quantized module, and those of them that differ from the recipe.

    Raises:
        UsageError: for a mixed recipe, if the model has no modules named down_proj.
    """
    import mlx.nn as nn

    # As in mlx-lm, a mixed recipe overrides the model's own choice of more bits for a module.
    of_model = _mixture(model, recipe) if recipe.mixed else getattr(model, "quant_predicate", None)
    applied: dict[str, dict[str, Any]] = {}
    overrides: dict[str, dict[str, Any]] = {}

    def predicate(path: str, module: nn.Module) -> _Decision:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % recipe.group_size:
            return False
        decision: _Decision = of_model(path, module) if of_model else True
        if isinstance(decision, dict):
            overrides[path] = decision
            # A module for which the model chooses the bits is affine by default, as in MLX.
            applied[path] = {"mode": "affine", **decision}
        elif decision:
            applied[path] = recipe.settings
        return decision

    nn.quantize(model, recipe.group_size, recipe.bits, mode=recipe.mode, class_predicate=predicate)
    return applied, overrides


def _mixture(model: nn.Module, recipe: Recipe) -> Callable[[str, nn.Module], _Decision]:
    """Make the rule of a mixed recipe for each module, as in mlx-lm 0.32's ``convert.py``.

    More bits go to the head, and to values and down projections in the first and last eighth of
    the layers and in every third layer between them; llama.cpp's Q4_K_M has a similar rule.
    """
    downs = [path for path, _ in model.named_modules() if "down_proj" in path]
    if not downs:
        raise UsageError(
            f"{recipe.mixed} needs modules named down_proj, which "
            f"{type(model).__module__.rpartition('.')[2]} does not have",
            "use a recipe with one number of bits, such as 4bit",
        )
    names = downs[0].split(".")
    position = next((i for i, name in enumerate(names) if _is_index(name)), len(names) - 1)
    low, high = MIXED[recipe.mixed]
    layers = len(model.layers)

    def decide(path: str, _: nn.Module) -> _Decision:
        parts = path.split(".")
        index = int(parts[position]) if len(parts) > position and _is_index(parts[position]) else 0
        eighth = layers // 8
        matters = index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2
        finer = "lm_head" in path or (
            matters and any(name in path for name in (*_VALUE_NAMES, "down_proj"))
        )
        return {**recipe.settings, "bits": high if finer else low}

    return decide


def _is_index(name: str) -> bool:
    # Not ``isdigit``, which is true of a superscript; nor a number that ``int`` refuses.
    return name.isdecimal() and len(name) < 10
