"""Check that a built model rotates queries and keys as its config says.

Some classes of mlx-lm ignore a statement about RoPE: Qwen3 MoE reads no ``rope_scaling``, GPT-OSS
no ``truncate``. The model then runs, with other numbers than its authors meant. So the modules of
the built model are compared with the frequencies that transformers computes from the same config.
What can be put right on the module is; everything else is refused by name.

The config must be in standard form (``models.config_form``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import UsageError
from k2cli.models.config_consistency import CONFIG_HINT
from k2cli.models.rope_form import TYPE_ALIASES, rope_by_layer_type

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_CLOSE = 2e-4
"""Largest relative difference of two wavelengths that counts as rounding to float32."""

_KNOWN = frozenset({
    "alpha", "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor",
    "long_factor", "low_freq_factor", "mscale", "mscale_all_dim",
    "original_max_position_embeddings",
    "long_mscale", "partial_rotary_factor", "rope_theta", "rope_type", "short_factor",
    "short_mscale", "truncate", "type",
})  # fmt: skip
"""Parameters that ``meant_rotation`` computes with."""

_WITHOUT_EFFECT = frozenset({
    "finetuned", "max_position_embeddings", "mrope_interleaved", "mrope_section",
})  # fmt: skip
"""Parameters that do not change what is computed for text."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Effect of one module: the wavelength of each rotated pair, over 2 pi, and an input's scale.

    ``dims`` is the number of rotated values; unrotated pairs have infinite wavelengths.
    """

    dims: int
    wavelengths: tuple[float, ...]
    scale: float = 1.0

    def is_close(self, other: Rotation) -> bool:
        """True if both are equal but for rounding."""
        return (
            len(self.wavelengths) == len(other.wavelengths)
            and math.isclose(self.scale, other.scale, rel_tol=_CLOSE)
            and all(
                math.isclose(one, two, rel_tol=_CLOSE)
                for one, two in zip(self.wavelengths, other.wavelengths, strict=True)
            )
        )


def rotations(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rotation]]:
    """Yield path, module and rotation of each module of a language model that applies RoPE."""
    for path, module in model.named_modules():
        if "vision" in path:
            continue
        found = _rotation(module)
        if found is not None:
            yield path, module, found


def _rotation(module: nn.Module) -> Rotation | None:
    if isinstance(module, nn.RoPE):
        values = _powers(module.base, module.dims)
        return Rotation(module.dims, tuple(value / module.scale for value in values))
    for name in ("_freqs", "_rope_freqs"):
        frequencies = getattr(module, name, None)
        if isinstance(frequencies, mx.array):
            scale = getattr(module, "mscale", getattr(module, "_scale", 1.0))
            found: list[float] = mx.abs(frequencies).tolist()  # type: ignore[assignment]
            return Rotation(2 * len(found), tuple(found), float(scale))
    base = getattr(module, "original_base", getattr(module, "base", None))
    if isinstance(base, int | float) and isinstance(getattr(module, "dims", None), int):
        # Dynamic scaling: up to the length that the model was trained for, RoPE as it is.
        return Rotation(module.dims, tuple(_powers(float(base), module.dims)))
    return None


def _powers(base: float, dims: int) -> list[float]:
    return [base ** (index / dims) for index in range(0, dims, 2)]


def meant_rotation(parameters: Mapping[str, Any], dims: int, fields: Mapping[str, Any]) -> Rotation:
    """Return the rotation that transformers computes for a layer.

    Args:
        parameters: those of the layer, in standard form, with a theta.
        dims: the number of values that the model's module rotates.
        fields: the config or ``text_config`` that they are from.

    Raises:
        KeyError, TypeError, ValueError, ZeroDivisionError: if a parameter is missing or no number.
        UsageError: for an unknown type.
    """
    kind = _kind(parameters)
    base, factor = float(parameters["rope_theta"]), parameters.get("factor")
    plain = _powers(base, dims)
    if kind == "default" or kind == "dynamic":
        if (alpha := parameters.get("alpha")) is not None:  # Hunyuan's own
            plain = _powers(base * float(alpha) ** (dims / (dims - 2)), dims)
        return Rotation(dims, tuple(plain))
    if kind == "linear":
        return Rotation(dims, tuple(value * float(parameters["factor"]) for value in plain))
    if kind == "proportional":
        rotated = int(dims * float(parameters.get("partial_rotary_factor", 1.0)))
        turning = [(factor or 1.0) * value for value in plain[: rotated // 2]]
        return Rotation(dims, (*turning, *[math.inf] * (dims // 2 - len(turning))))
    original = float(parameters["original_max_position_embeddings"])
    if kind == "llama3":
        return Rotation(dims, tuple(_llama3(plain, parameters, original)))
    if kind == "yarn":
        return Rotation(dims, tuple(_yarn(plain, base, parameters)), _yarn_scale(parameters))
    if kind == "longrope":
        factors = parameters["long_factor"]
        factors = factors if isinstance(factors, list) else [factors] * len(plain)
        wavelengths = [float(f) * value for f, value in zip(factors, plain, strict=True)]
        ratio = factor or float(fields["max_position_embeddings"]) / original
        scale = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
        given = parameters.get("attention_factor") or parameters.get("long_mscale")
        return Rotation(dims, tuple(wavelengths), float(given or scale))
    raise UsageError(f"config.json has rope_type '{kind}', which k2 does not know")


def _kind(parameters: Mapping[str, Any]) -> str:
    name = str(parameters.get("rope_type", "default"))
    return TYPE_ALIASES.get(name, name)


def _llama3(plain: list[float], parameters: Mapping[str, Any], original: float) -> Iterator[float]:
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    for value in plain:
        length = 2 * math.pi * value
        if length < original / high:
            yield value
        elif length > original / low:
            yield value * factor
        else:
            smooth = (original / length - low) / (high - low)
            yield value / ((1 - smooth) / factor + smooth)


def _yarn(plain: list[float], base: float, parameters: Mapping[str, Any]) -> Iterator[float]:
    dims = 2 * len(plain)
    factor = float(parameters["factor"])
    original = float(parameters["original_max_position_embeddings"])

    def boundary(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = boundary(float(parameters.get("beta_fast") or 32))
    high = boundary(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if low == high else high
    for index, value in enumerate(plain):
        stretched = min(max((index - low) / (high - low), 0.0), 1.0)
        yield 1 / (stretched / (factor * value) + (1 - stretched) / value)


def _yarn_scale(parameters: Mapping[str, Any]) -> float:
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    factor = float(parameters["factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    one, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(float(one)) / scale(float(all_dims)) if one and all_dims else scale(1.0)


# --- the check ----------------------------------------------------------------------------------


def check_rope(model: nn.Module, config: Mapping[str, Any], name: str, source: str) -> None:
    """Compare the RoPE of a built model with its config; correct what YaRN's modules leave out.

    Args:
        model: the model, as mlx-lm's class builds it.
        config: its config in standard form.
        name: the name of the class's file, for messages.
        source: the text of that file: a parameter that occurs in it is the class's own affair.

    Raises:
        UsageError: naming the statement that the class does not compute.
    """
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) else config
    by_type = {
        key: {"rope_theta": fields.get("rope_theta"), **each}
        for key, each in rope_by_layer_type(fields).items()
        if each is not None
    }
    found = list(rotations(model))
    if not by_type or not found or "compress_rope_theta" in fields:
        return  # DeepSeek V4 has two kinds of RoPE per layer, which its class computes itself
    for parameters in by_type.values():
        for key in parameters.keys() - _KNOWN - _WITHOUT_EFFECT:
            if key not in source and parameters[key] is not None:
                raise _unread(f"rope_parameters.{key}", parameters[key], name)
    _check_pairs(found, fields, name, source)
    for path, module, rotation in found:
        layer = _LAYER.search(f".{path}.")
        index = int(layer[1]) if layer else None
        candidates = _candidates(by_type, fields, index)
        candidates = [each for each in candidates if each.get("rope_theta") is not None]
        if candidates:
            _check_module(module, rotation, candidates, fields, name)


def _check_pairs(
    found: list[tuple[str, nn.Module, Rotation]], fields: Mapping[str, Any], name: str, source: str
) -> None:
    """Refuse another pairing of values than the modules rotate: neighbours, or halves."""
    interleaved = fields.get("rope_interleave")
    if not isinstance(interleaved, bool) or "rope_interleave" in source:
        return
    if any(getattr(module, "traditional", interleaved) != interleaved for _, module, _ in found):
        raise _unread("rope_interleave", interleaved, name)


def _candidates(
    by_type: Mapping[str | None, dict[str, Any]], fields: Mapping[str, Any], index: int | None
) -> list[dict[str, Any]]:
    """List the parameters that a layer's module may have; several if its type is not known."""
    types = fields.get("layer_types")
    known = isinstance(types, list) and index is not None and index < len(types)
    layer_type = types[index] if known and types is not None and index is not None else None
    chosen = [by_type[layer_type]] if layer_type in by_type else list(by_type.values())
    theta = fields.get("rope_theta")
    if isinstance(theta, list) and index is not None and index < len(theta):
        chosen = [{**each, "rope_theta": theta[index]} for each in chosen]
    only = fields.get("yarn_only_types")  # Step 3.5's own
    if only and layer_type is not None and layer_type not in only:
        chosen = [{**each, "rope_type": "default"} for each in chosen]
    return chosen


def _check_module(
    module: nn.Module,
    found: Rotation,
    candidates: list[dict[str, Any]],
    fields: Mapping[str, Any],
    name: str,
) -> None:
    for parameters in candidates:
        try:
            meant = meant_rotation(parameters, found.dims, fields)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            kind = parameters.get("rope_type")
            raise UsageError(
                f"config.json's RoPE of type '{kind}' lacks a number: {error}",
                CONFIG_HINT,
            ) from error
        if found.is_close(meant):
            _check_dims(module, parameters, found.dims, fields, name)
            return
        if _corrected(module, found, meant, parameters, fields):
            return
    raise _not_computed(found, candidates[0], fields, name)


def _corrected(
    module: nn.Module,
    found: Rotation,
    meant: Rotation,
    parameters: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> bool:
    """Put right a module of YaRN that ignores ``truncate`` or ``attention_factor``."""
    if _kind(parameters) != "yarn" or not hasattr(module, "mscale"):
        return False
    ignored = {"truncate", "attention_factor"}
    bare = {key: value for key, value in parameters.items() if key not in ignored}
    if not found.is_close(meant_rotation(bare, found.dims, fields)):
        return False
    module._freqs = mx.array(meant.wavelengths, dtype=mx.float32)
    module.mscale = meant.scale
    return True


def _check_dims(
    module: nn.Module,
    parameters: Mapping[str, Any],
    dims: int,
    fields: Mapping[str, Any],
    name: str,
) -> None:
    """Compare the number of rotated values with the part of the head that the config gives.

    A plain module that rotates the whole head, as that of GLM does, is told the part.
    """
    factor = parameters.get("partial_rotary_factor")
    if not isinstance(factor, int | float) or _kind(parameters) == "proportional":
        return
    heads = [
        fields[key]
        for key in ("head_dim", "global_head_dim", "swa_head_dim", "index_head_dim", "qk_dim",
                    "qk_rope_head_dim", "hidden_size_per_head")
        if isinstance(fields.get(key), int)
    ]  # fmt: skip
    width, count = fields.get("hidden_size"), fields.get("num_attention_heads")
    if isinstance(width, int) and isinstance(count, int) and count:
        heads.append(width // count)
    latent = fields.get("qk_rope_head_dim")
    if not heads or dims in {int(head * factor) for head in heads} | {latent}:
        return
    if isinstance(module, nn.RoPE) and dims in heads:
        module.dims = int(dims * factor)
    else:
        raise _unread("partial_rotary_factor", factor, name)


def _not_computed(
    found: Rotation, parameters: Mapping[str, Any], fields: Mapping[str, Any], name: str
) -> UsageError:
    kind = _kind(parameters)
    plain = {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    if kind == "default" or not found.is_close(meant_rotation(plain, found.dims, fields)):
        theta = parameters["rope_theta"]
        if kind == "default":
            return _unread("rope_theta", theta, name)
        return _unread(f"rope_scaling of type {kind} with rope_theta", theta, name)
    return _unread(f"rope_scaling of type {kind} with factor", parameters.get("factor"), name)


def _unread(field: str, value: Any, name: str) -> UsageError:
    return UsageError(
        f"config.json has {field} {value!r}, which mlx-lm's {name} does not compute"[:300],
        "with other numbers the model would answer wrongly: choose a conversion without it, "
        "or an architecture that has it",
    )
