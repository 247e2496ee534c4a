"""Refusal of a ``config.json`` that contradicts itself, or says something of the wrong kind.

mlx-lm's classes take such statements without a word: text such as ``"false"`` is true to them, and
of two lists of layers they read the one that they know. The model then runs with other numbers than
its authors meant. Only what the config itself says is compared here; what a class makes of it is
checked where the class is known (``sharding``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2cli.errors import UsageError
from k2cli.models.json_files import shown
from k2cli.units import clean_text

CONFIG_HINT = "take config.json from the model's repository"
"""What to do about a config that k2 refuses."""

_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_PER_LAYER = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type",
    "hybrid_override_pattern",
)  # fmt: skip
"""Lists (or texts) with one entry for each layer."""

_EXTRA_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Layers that predict further tokens; some lists describe them, too."""

_SHARED_QUANTIZATION = ("bits", "group_size", "mode")
_MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""Modes of MLX, each with the bits and group sizes that its kernels have."""

_ALWAYS_SLIDING = ("gpt_oss",)
_LONGROPE = ("longrope", "su")


def check_consistency(fields: Mapping[str, Any], source: str) -> None:
    """Check what one model's config says, before it is brought into another form.

    Args:
        fields: the config as written, or its ``text_config``.
        source: its path, for messages.

    Raises:
        UsageError: naming the field and its value.
    """
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise _refused(
                source, f"{name} must be the name of a float type, not {_written(value)}"
            )
    one, other = (str(fields.get(name)).removeprefix("torch.") for name in ("dtype", "torch_dtype"))
    if "None" not in (one, other) and one != other:
        raise _refused(source, f"dtype is {_written(one)}, but torch_dtype is {_written(other)}")
    _check_layer_lists(fields, source)
    _check_window(fields, source)
    _check_two_quantizations(fields, source)


def _check_layer_lists(fields: Mapping[str, Any], source: str) -> None:
    layers = next((fields[name] for name in _LAYERS if _is_count(fields.get(name))), None)
    if layers is None:
        return
    extra = sum(fields[name] for name in _EXTRA_LAYERS if _is_count(fields.get(name)))
    for name in _PER_LAYER:
        value = fields.get(name)
        if not isinstance(value, list | str) or not value:
            continue
        if len(value) not in (layers, layers + extra):
            raise _refused(source, f"{name} describes {len(value)} layers, but there are {layers}")


def _check_window(fields: Mapping[str, Any], source: str) -> None:
    """Refuse layers with a sliding window of no length."""
    if "sliding_window" not in fields or fields["sliding_window"] not in (None, 0, False):
        return
    types = fields.get("layer_types")
    always = fields.get("model_type") in _ALWAYS_SLIDING and not isinstance(types, list)
    if fields.get("use_sliding_window") is False:
        return
    if always or (isinstance(types, list) and "sliding_attention" in types):
        raise _refused(
            source,
            f"sliding_window is {_written(fields['sliding_window'])}, but there are layers of type "
            "sliding_attention, which need its length in tokens",
        )


def _check_two_quantizations(fields: Mapping[str, Any], source: str) -> None:
    """Refuse two statements about quantization that differ.

    mlx-lm writes the same one under both names, and reads only ``quantization``. Of a config with
    a ``text_config`` it reads the outer one.
    """
    places = {name: fields.get(name) for name in ("quantization", "quantization_config")}
    text = fields.get("text_config")
    if isinstance(text, Mapping):
        places |= {f"text_config.{name}": text.get(name) for name in tuple(places)}
    given = {place: each for place, each in places.items() if isinstance(each, Mapping)}
    for place, theirs in list(given.items())[1:]:
        first, ours = next(iter(given.items()))
        for name in _SHARED_QUANTIZATION:
            mine, other = ours.get(name), theirs.get(name)
            if mine is not None and other is not None and mine != other:
                raise _refused(
                    source,
                    f"{first}.{name} is {_written(mine)}, but {place}.{name} is {_written(other)}",
                )


def check_quantization(quantization: Any, source: str) -> None:
    """Check the settings of MLX's quantization, those of single layers included.

    Raises:
        UsageError: naming the field and its value.
    """
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise UsageError(
            f"{source}: quantization must be an object, not {_written(quantization)}", CONFIG_HINT
        )
    _check_settings(quantization, "quantization", source)
    for layer, settings in quantization.items():
        if isinstance(settings, Mapping):
            _check_settings(settings, f"quantization[{clean_text(layer)[:100]!r}]", source)


def _check_settings(settings: Mapping[str, Any], where: str, source: str) -> None:
    mode = settings.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _MODES:
        options = ", ".join(_MODES)
        raise UsageError(
            f"{source}: {where}.mode must be one of {options}, not {_written(mode)}", CONFIG_HINT
        )
    for name, allowed in zip(("bits", "group_size"), _MODES[mode], strict=True):
        value = settings.get(name)
        if value is None and where != "quantization":
            continue  # MLX's own default for a single layer
        if isinstance(value, bool) or value not in allowed:
            options = ", ".join(map(str, allowed))
            of_mode = "" if mode == "affine" else f" with mode {mode}"
            must = f"must be one of {options}" if len(allowed) > 1 else f"must be {options}"
            raise UsageError(
                f"{source}: {where}.{name} {must}{of_mode}, not {_written(value)}", CONFIG_HINT
            )


def check_long_lists(fields: Mapping[str, Any], source: str) -> None:
    """Check that the lists of LongRoPE have a number for each pair of rotated dimensions.

    Args:
        fields: the config in standard form.
        source: its path, for messages.

    Raises:
        UsageError: naming the list and both lengths.
    """
    scaling = fields.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") not in _LONGROPE:
        return
    pairs = _rotated_pairs(fields)
    if pairs is None:
        return
    for name in ("short_factor", "long_factor"):
        value = scaling.get(name)
        if isinstance(value, list) and len(value) != pairs:
            raise _refused(
                source,
                f"{name} of LongRoPE has {len(value)} numbers, but a head rotates {pairs} pairs "
                "of dimensions",
            )


def _rotated_pairs(fields: Mapping[str, Any]) -> int | None:
    if _is_count(fields.get("qk_rope_head_dim")):
        return int(fields["qk_rope_head_dim"]) // 2
    head: Any = fields.get("head_dim")
    width: Any = fields.get("hidden_size")
    heads: Any = fields.get("num_attention_heads")
    if not _is_count(head):
        if not _is_count(width) or not _is_count(heads) or heads == 0:
            return None
        head = int(width) // int(heads)
    part: Any = fields.get("partial_rotary_factor")
    part = part if is_number(part) else 1.0
    return int(head * part) // 2


def check_booleans(fields: Mapping[str, Any], names: Mapping[str, bool], source: str) -> None:
    """Refuse text or a number in a field that is true or false, and null that could mean either.

    mlx-lm takes null for false. That is right where a field that is absent is false, too, or has
    None as its default.

    Args:
        names: the fields that the architecture's arguments declare as booleans, and for each
            whether null says the same there as no field.

    Raises:
        UsageError: naming the field and its value.
    """
    for name in sorted(names):
        if name not in fields or isinstance(value := fields[name], bool):
            continue
        if value is not None or not names[name]:
            raise _refused(source, f"{name} must be true or false, not {_written(value)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _written(value: Any) -> str:
    """Format a value for a message; None is written as in JSON."""
    return "null" if value is None else clean_text(shown(value))


def _refused(source: str, words: str) -> UsageError:
    return UsageError(f"{source}: {clean_text(words)[:300]}", CONFIG_HINT)


def contradiction(name: str, value: Any, place: str, other: Any, source: str) -> UsageError:
    """Make the error for a statement that a config makes twice with different values.

    Args:
        name: the field, or the field and its place.
        value: its value there.
        place: the other place.
        other: the value in the other place.
        source: the path of the config.
    """
    words = f"{name} is {value!r}, but {other!r} in {place}"
    return UsageError(f"{source} contradicts itself: {clean_text(words)[:300]}", CONFIG_HINT)


def is_number(value: object) -> bool:
    """True for an integer or a float, False for a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
