"""Lazy assembly of a model from its config and weights, used by the planner and by ranks.

mlx arrays are lazy, so assembling the full trillion-parameter model allocates nothing; the sum of
``nbytes`` over its parameters is nevertheless exact. The planner passes no weights (or lazy zeros
with the shapes of the checkpoint's headers), a rank passes the lazily opened checkpoint. Both go
through the same steps as mlx-lm's own loader: sanitize, quantize as the config says, fill in.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import K2Error, UsageError
from k2cli.models.class_defaults import check_defaults
from k2cli.models.config_consistency import check_booleans
from k2cli.models.config_form import standard_config
from k2cli.sharding.architectures import (
    MODEL_FAILURES,
    class_source,
    model_classes,
    module_name,
)
from k2cli.sharding.model_errors import explain_failure
from k2cli.sharding.rope_check import check_rope
from k2cli.sharding.stored_weights import refuse_packed, with_stored_head, without_copies
from k2cli.sharding.unread_fields import check_unread

FLOAT_TYPES: Mapping[str, mx.Dtype] = {
    "float32": mx.float32,
    "bfloat16": mx.bfloat16,
    "float16": mx.float16,
}
_FLOAT32_FIELD = "k2_float32"  # models.catalog writes it


def build(config: Mapping[str, Any]) -> nn.Module:
    """Build the model of a config with lazy, random, unquantized parameters.

    Raises:
        UsageError: if a field of the config is missing or makes no model, or says something
            that changes the result and that the class does not compute.
    """
    model_class, arguments_class = model_classes(config)
    standard = standard_config(config, "config.json")
    try:
        # mlx-lm's classes change what they are given.
        model = model_class(arguments_class.from_dict(copy.deepcopy(standard)))
    except MODEL_FAILURES as error:
        raise UsageError(
            f"config.json does not describe a {config.get('model_type')} model: "
            f"{explain_failure(error, config)}"
        ) from error
    booleans = _boolean_fields(model, arguments_class)
    for each in (standard, standard.get("text_config")):
        if isinstance(each, Mapping):
            check_booleans(each, booleans, "config.json")
    check_defaults(standard)
    name, source = module_name(config), class_source(config)
    check_unread(standard, name, source)
    check_rope(model, standard, name, source)
    return model


def _boolean_fields(model: nn.Module, arguments: type[Any]) -> dict[str, bool]:
    """Find the fields that a model's argument classes declare as true or false.

    Returns:
        For each, whether all of these classes have a default that null is equal to: false or None.
    """
    classes = {arguments}
    for module in model.modules():
        own = (vars(module).get(name, module.get(name)) for name in ("args", "config"))
        classes |= {type(each) for each in own if dataclasses.is_dataclass(each)}
    found: dict[str, bool] = {}
    for each in filter(dataclasses.is_dataclass, classes):
        for field in dataclasses.fields(each):
            if field.type in (bool, bool | None, "bool", "Optional[bool]", "bool | None"):
                empty = field.default in (None, False)
                found[field.name] = found.get(field.name, True) and empty
    return found


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the MLX quantization (``group_size``, ``bits``, ``mode``, overrides), or None.

    An MLX checkpoint has it in ``quantization``; originals in ``quantization_config``, which may
    be inside ``text_config``. fp8 with block scales is no MLX quantization: it is dequantized.

    Raises:
        UsageError: for a method that mlx-lm cannot load.
    """
    if (own := config.get("quantization")) is not None:
        return _checked(own)
    original = config.get("quantization_config") or (config.get("text_config") or {}).get(
        "quantization_config"
    )
    if not original:
        return None
    method = original.get("quant_method")
    for field in ("quant_method", "format"):
        if not isinstance(original.get(field), str | None):
            raise UsageError(f"config.json: quantization_config.{field} must be a string")
    fixed = {
        ("compressed-tensors", "pack-quantized"): (32, 4, "affine"),
        ("compressed-tensors", "mxfp4-pack-quantized"): (32, 4, "mxfp4"),
        ("compressed-tensors", "nvfp4-pack-quantized"): (16, 4, "nvfp4"),
        ("mxfp4", None): (32, 4, "mxfp4"),
        ("mxfp8", None): (32, 8, "mxfp8"),
    }
    known = fixed.get((method, original.get("format") if method == "compressed-tensors" else None))
    if known is not None:
        group_size, bits, mode = known
        return {"group_size": group_size, "bits": bits, "mode": mode}
    if method == "fp8":
        return None
    if "bits" in original and "group_size" in original and method is None:
        return _checked(original)
    raise UsageError(
        f"config.json has quantization_config.quant_method {method!r}"
        + (f" with format {original['format']!r}" if original.get("format") else "")
        + ", which k2 cannot load",
        "use an MLX conversion of the model, or its original weights",
    )


def _checked(quantization: Any) -> dict[str, Any]:
    """Check the sizes in an MLX quantization entry."""
    if not isinstance(quantization, Mapping):
        raise UsageError(f"config.json has quantization {quantization!r}, expected an object")
    for field in ("group_size", "bits"):
        value = quantization.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1024:
            raise UsageError(f"config.json has quantization.{field} {value!r}")
    return dict(quantization)


def _left_unquantized(config: Mapping[str, Any]) -> list[str] | None:
    """List the modules that a checkpoint's makers left unquantized; None if the config has no list.

    compressed-tensors lists them as ``ignore``: names, or regular expressions after ``re:``;
    mxfp4 as ``modules_to_not_convert``: names with wildcards. MLX conversions of such checkpoints
    keep the list beside their own ``quantization``.
    """
    original = config.get("quantization_config") or (config.get("text_config") or {}).get(
        "quantization_config"
    )
    if not isinstance(original, Mapping):
        return None
    method = original.get("quant_method")
    field = {"compressed-tensors": "ignore", "mxfp4": "modules_to_not_convert"}.get(str(method))
    patterns = original.get(field) if field else None
    if patterns is None:
        return None
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise UsageError(f"config.json: quantization_config.{field} must be a list of names")
    return patterns


def _ignored_by_original(patterns: list[str]) -> Callable[[str], bool]:
    """Return a test, by a module's MLX path, if the makers' patterns leave it unquantized.

    Raises:
        UsageError: for an invalid regular expression.
    """
    try:
        expressions = [re.compile(each[3:]) for each in patterns if each.startswith("re:")]
    except re.error as error:
        raise UsageError(
            f"config.json: quantization_config.ignore has '{error.pattern!s}', "
            f"which is not a regular expression: {error.msg}"
        ) from error
    names = [each for each in patterns if not each.startswith("re:")]

    def ignored(path: str) -> bool:
        name = path.replace(".switch_mlp.", ".experts.0.")
        name = name.removeprefix("language_model.")
        if any(expression.match(name) for expression in expressions):
            return True
        for pattern in names:
            if name == pattern or name.endswith("." + pattern):
                return True
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"):
                return True
        return not patterns or "embed_tokens" in name

    return ignored


def _can_quantize(module: nn.Module, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def _predicate_without_weights(
    model: nn.Module, config: Mapping[str, Any], quantization: Mapping[str, Any]
) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Choose the modules to quantize from the config alone, by mlx_lm.convert's own rule."""
    group_size = int(quantization["group_size"])
    of_model = getattr(model, "quant_predicate", None)
    patterns = _left_unquantized(config)
    if patterns is None and "quantization" not in config:
        patterns = []
    ignored = _ignored_by_original(patterns) if patterns is not None else None

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            entry = quantization[path]
            return dict(entry) if isinstance(entry, Mapping) else bool(entry)
        if not _can_quantize(module, group_size):
            return False
        decision: bool | dict[str, Any] = of_model(path, module) if of_model is not None else True
        if ignored is not None:
            # Makers leave unquantized what a model wants with other bits, above all its router.
            return decision is True and not ignored(path)
        return decision

    return predicate


def _packing(path: str, module: nn.Module, weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """Derive group size, bits and mode of a stored weight from its shapes.

    Raises:
        K2Error: if the shapes are those of no quantized weight. MLX would divide by zero.
    """
    scales, packed = weights[f"{path}.scales"], weights.get(f"{path}.weight")
    if packed is None:
        raise K2Error(f"the checkpoint lacks tensors: {path}.weight")
    input_size = module.weight.shape[-1]
    groups = scales.shape[-1] if scales.ndim else 0
    if not groups or input_size % groups or not packed.ndim:
        raise K2Error(
            f"tensors {path}.weight of shape {tuple(packed.shape)} and {path}.scales of shape "
            f"{tuple(scales.shape)} are no quantized weight of {input_size} inputs"
        )
    group_size = input_size // groups
    bits = packed.shape[-1] * 32 // input_size
    if scales.dtype != mx.uint8:
        return {"group_size": group_size, "bits": bits, "mode": "affine"}
    modes = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
    if (bits, group_size) not in modes:
        raise K2Error(
            f"tensor {path}.weight is packed with {bits} bits in groups of {group_size}, "
            "which no MLX mode has"
        )
    return {"group_size": group_size, "bits": bits, "mode": modes[bits, group_size]}


def _predicate_with_weights(
    quantization: Mapping[str, Any], weights: Mapping[str, mx.array]
) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            entry = quantization[path]
            return dict(entry) if isinstance(entry, Mapping) else bool(entry)
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return _packing(path, module, weights)

    return predicate


def _quantize(
    model: nn.Module, config: Mapping[str, Any], weights: Mapping[str, mx.array] | None
) -> None:
    quantization = quantization_of(config)
    if quantization is None:
        return
    predicate = (
        _predicate_with_weights(quantization, weights)
        if weights is not None
        else _predicate_without_weights(model, config, quantization)
    )
    try:
        nn.quantize(
            model,
            group_size=int(quantization["group_size"]),
            bits=int(quantization["bits"]),
            mode=str(quantization.get("mode", "affine")),
            class_predicate=predicate,
        )
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"config.json's quantization cannot be applied: {error}") from error


def cast(model: nn.Module, dtype: mx.Dtype, *, kept: tuple[str, ...] | None = None) -> None:
    """Cast floating parameters, scales included, lazily and in place.

    Parameters that the model excludes (its ``cast_predicate``: the router's correction bias) stay
    as they are; if ``kept`` is given, those whose names contain one of its parts instead.
    """
    casts = getattr(model, "cast_predicate", None)

    def convert(path: str, value: mx.array) -> mx.array:
        if kept is not None:
            wanted = not any(part in path for part in kept)
        else:
            wanted = casts is None or casts(path)
        return value.astype(dtype) if wanted and mx.issubdtype(value.dtype, mx.floating) else value

    from mlx.utils import tree_map_with_path

    model.update(tree_map_with_path(convert, model.parameters()))


def config_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    """Return the config's float type for unquantized parameters; bfloat16 if it names none."""
    text_config = config.get("text_config") or {}
    for source in (config, text_config):
        name = source.get("torch_dtype") or source.get("dtype")
        if isinstance(name, str) and name.removeprefix("torch.") in FLOAT_TYPES:
            return FLOAT_TYPES[name.removeprefix("torch.")]
    return mx.bfloat16


def _kept_float32(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return parts of the names of float32 parameters, for a checkpoint without headers.

    The catalog has them for some shapes; a config.json does not.
    """
    named = config.get(_FLOAT32_FIELD)
    return tuple(named) if isinstance(named, list) and all(map(_is_text, named)) else ()


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def assemble(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array] | None,
    dtype: str = "checkpoint",
) -> nn.Module:
    """Assemble the whole model lazily, quantized as stored and with the given weights.

    Args:
        config: the checkpoint's config.json.
        weights: the checkpoint's tensors by their stored names (lazy), or None if only the
            config is known: then every float parameter has the config's dtype.
        dtype: ``checkpoint`` keeps the stored float types; a name of ``FLOAT_TYPES`` casts.

    Raises:
        UsageError: if the config does not describe a model.
        K2Error: if the tensors are not those of this model; the message names some of them.
    """
    model = build(config if weights is None else with_stored_head(config, weights))
    if weights is None:
        _quantize(model, config, None)
        cast(model, config_dtype(config), kept=_kept_float32(config))
    else:
        refuse_packed(weights)
        sanitized = without_copies(model, config, _sanitize(model, dict(weights)))
        _quantize(model, config, sanitized)
        _fill(model, sanitized)
    if dtype != "checkpoint":
        cast(model, FLOAT_TYPES[dtype])
    model.eval()
    return model


def _sanitize(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    if not hasattr(model, "sanitize"):
        return weights
    try:
        sanitized: dict[str, mx.array] = model.sanitize(weights)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise K2Error(f"the checkpoint's tensors do not fit its config: {error!r}") from error
    return sanitized


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _type_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _fill(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Load the tensors into the model, whose parameters they must match one to one."""
    from mlx.utils import tree_flatten

    places = dict(tree_flatten(model.parameters()))
    missing = sorted(places.keys() - weights.keys())
    unknown = sorted(weights.keys() - places.keys())
    misshapen = [
        f"{name} is {weights[name].shape}, expected {place.shape}"
        for name, place in places.items()
        if name in weights and weights[name].shape != place.shape
    ] or [
        f"{name} is {_type_name(weights[name])}, expected {_type_name(place)}"
        for name, place in places.items()
        if name in weights and _is_float(weights[name]) != _is_float(place)
    ]
    for kind, names in (("lacks", missing), ("has unknown", unknown), ("has wrong", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise K2Error(f"the checkpoint {kind} tensors: {', '.join(names[:3])}{more}")
    model.load_weights(list(weights.items()), strict=True)
