"""One form for what a ``config.json`` says of RoPE (rotary position embedding).

Authors write it flat (``rope_theta``, ``rope_scaling``), in ``rope_parameters`` for all layers or
by layer type, and under names that one model type has of its own. ``standardize_rope`` merges
these places and writes the result to all of them, because each class of mlx-lm reads one.
``config_form`` calls it for the whole config and for its ``text_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2cli.errors import UsageError
from k2cli.models.config_consistency import CONFIG_HINT, contradiction, is_number

TYPE_ALIASES = {
    "su": "longrope", "deepseek_yarn": "yarn", "telechat3-yarn": "yarn", "mrope": "default",
    "axial": "default",
}  # fmt: skip
"""Names of RoPE types that stand for another one in a model that is given text alone."""

_THETA_NAMES = ("rotary_emb_base", "rope_freq_constant", "rope_embedding_base")
"""Further names of ``rope_theta``, in GPT-NeoX, OpenELM and Phi-3-small."""

_SLIDING_THETAS = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
"""Names of the ``rope_theta`` of layers with a sliding window, in Gemma, PLaMo 3 and MiMo V2."""

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "openelm": {"rope_theta": "rope_freq_constant"},
    "phi3small": {"rope_theta": "rope_embedding_base"},
    "gemma3": {"sliding": "rope_local_base_freq"},
    "gemma3_text": {"sliding": "rope_local_base_freq"},
    "gemma3n": {"sliding": "rope_local_base_freq"},
    "gemma3n_text": {"sliding": "rope_local_base_freq"},
    "gear": {"sliding": "rope_local_base_freq"},
    "plamo3": {"sliding": "rope_local_theta"},
    "mimo_v2_flash": {"sliding": "swa_rope_theta"},
    "minimax": {"rotary_dim": "rotary_dim"},
    "minimax_m2": {"rotary_dim": "rotary_dim"},
}
"""Names that a model type has for fields of RoPE; ``sliding`` is the theta of sliding layers."""

_BY_LAYER_TYPE = (
    "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "laguna", "mellum",
    "spark2_5",
)  # fmt: skip
"""Model types whose classes look for RoPE under the type of each layer."""

_SCALED_ON_FULL_ATTENTION_ALONE = ("olmo3", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
"""Model types of which a ``rope_scaling`` for all layers means those without a sliding window."""

_DEFAULT_PARTS = {
    "glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "nemotron": 0.5, "phi": 0.5, "stablelm": 0.25,
}  # fmt: skip
"""The part of a head that is rotated, by model type, if the config does not say it.

These are the values that transformers takes.
"""

_FULL, _SLIDING = "full_attention", "sliding_attention"

_FACTOR_LIMIT = 1e9
"""A factor of scaling must be below it: a limit far above all factors in use."""

_NUMBERS = frozenset({
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "low_freq_factor",
    "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor",
})  # fmt: skip
"""Parameters that are single numbers in every type."""


def rope_by_layer_type(fields: Mapping[str, Any]) -> dict[str | None, dict[str, Any] | None]:
    """Return what a config in standard form says of RoPE: the parameters of each layer type.

    The key None stands for all layers. Null parameters are those of layers without RoPE.
    """
    parameters = fields.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return {}
    nested = _layer_types(parameters)
    if nested:
        return {name: parameters[name] for name in nested}
    return {None: dict(parameters)}


def _layer_types(parameters: Mapping[str, Any]) -> list[str]:
    """List the keys of ``rope_parameters`` that are types of layers, not parameters."""
    return [
        name
        for name, value in parameters.items()
        if isinstance(value, Mapping) or (value is None and name.endswith("_attention"))
    ]


def standardize_rope(fields: dict[str, Any], source: str) -> None:
    """Write what a config says of RoPE to every place in which a class of mlx-lm looks for it.

    Args:
        fields: the config, or its ``text_config``; it is changed.
        source: its path, for messages.

    Raises:
        UsageError: if it contradicts itself, or a field of RoPE has another type.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if fields.get(name) is not None and not isinstance(fields[name], dict):
            raise UsageError(f"{source}: {name} must be an object, not {fields[name]!r}"[:200])
    parameters = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    types = _layer_types(parameters)
    outer = {"rope_theta": _theta(fields, source),
             "partial_rotary_factor": _partial_factor(fields, source)}  # fmt: skip
    outer = {name: value for name, value in outer.items() if value is not None}
    whole = {name: each for name, each in parameters.items() if name not in types}
    if types:
        _standardize_by_layer_type(fields, types, whole, source)
        return
    merged = _merged((outer, whole, _typed(scaling, source)), source)
    if not merged:
        return
    part = _DEFAULT_PARTS.get(str(fields.get("model_type")))
    if part is not None:
        merged.setdefault("partial_rotary_factor", part)
    _take_original_length(fields, merged)
    merged = _typed({"rope_type": merged.get("type", "default"), **merged}, source)
    _write_flat(fields, merged)
    local = _of_sliding_layers(fields, merged)
    if local is not None:
        fields["rope_parameters"] = {_FULL: merged, _SLIDING: local}
    elif fields.get("model_type") in _BY_LAYER_TYPE:
        named = fields.get("layer_types")
        names = dict.fromkeys(named if isinstance(named, list) else (_FULL, _SLIDING))
        fields["rope_parameters"] = {**merged, **{str(name): dict(merged) for name in names}}
    else:
        fields["rope_parameters"] = merged
    _write_renamed(fields, merged, local)


def _of_sliding_layers(
    fields: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the parameters that layers with a sliding window have of their own, if they do."""
    theta = next((fields[n] for n in _SLIDING_THETAS if fields.get(n) is not None), None)
    model_type = str(fields.get("model_type"))
    if theta is None:
        if model_type not in _SCALED_ON_FULL_ATTENTION_ALONE:
            return None
        theta = 10000.0 if model_type.startswith("gemma") else parameters.get("rope_theta")
    local = {"rope_type": "default", "type": "default", "rope_theta": theta}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in parameters:
            local.setdefault(name, parameters[name])
    return {name: value for name, value in local.items() if value is not None}


def _standardize_by_layer_type(
    fields: dict[str, Any], types: list[str], whole: Mapping[str, Any], source: str
) -> None:
    """Complete the parameters of each layer type, and write those of full attention flat."""
    parameters = fields["rope_parameters"]
    # A theta beside them is a default of transformers for the types that have none.
    defaults = {"rope_theta": fields.get("rope_theta"),
                "partial_rotary_factor": fields.get("partial_rotary_factor"), **whole}  # fmt: skip
    by_type: dict[str, Any] = {}
    for name in types:
        if parameters[name] is None:
            by_type[name] = None
            continue
        own = _typed(parameters[name], f"{source}, rope_parameters.{name}")
        own = {"rope_type": "default", "type": "default", **own}
        for key, value in defaults.items():
            if value is not None and key in ("rope_theta", "partial_rotary_factor"):
                own.setdefault(key, value)
        _take_original_length(fields, own)
        by_type[name] = own
    given = {name: each for name, each in by_type.items() if each is not None}
    if any("partial_rotary_factor" in each for each in given.values()):
        for each in given.values():
            each.setdefault("partial_rotary_factor", 1.0)
    main = given.get(_FULL) or next(iter(given.values()), None)
    if main is None:
        return
    for name in ("rope_theta", "partial_rotary_factor"):
        values = [each.get(name) for each in given.values()]
        # Numbers per layer, as Step 3.5 has them, are not compared.
        if is_number(fields.get(name)) and fields[name] not in values:
            raise contradiction(name, fields[name], f"rope_parameters.{_FULL}", main[name], source)
    scaling = fields.get("rope_scaling")
    _write_flat(fields, main)
    if scaling is not None and _typed(scaling, source).get("rope_type") not in (
        main["rope_type"], None
    ):  # fmt: skip
        raise contradiction(
            "rope_scaling", scaling, f"rope_parameters.{_FULL}", main["rope_type"], source
        )
    sliding = given.get(_SLIDING)
    if all(each == main for each in given.values()) and len(given) == len(by_type):
        # The same for all: classes that read one for all layers find it beside the types.
        fields["rope_parameters"] = {**main, **by_type}
    else:
        fields["rope_parameters"] = by_type
    _write_renamed(fields, main, sliding)


def _theta(fields: Mapping[str, Any], source: str) -> Any:
    """Return ``rope_theta``, by whichever of its names; None if the config does not say it."""
    given = {n: fields[n] for n in ("rope_theta", *_THETA_NAMES) if fields.get(n) is not None}
    attention = fields.get("attn_config")  # DBRX's place for it
    if isinstance(attention, dict) and attention.get("rope_theta") is not None:
        given["attn_config.rope_theta"] = attention["rope_theta"]
    values = list(given.items())
    for name, value in values[1:]:
        if value != values[0][1]:
            raise contradiction(*values[0], name, value, source)
    return values[0][1] if values else None


def _partial_factor(fields: Mapping[str, Any], source: str) -> Any:
    """Return the rotated part of a head, by either name; None if the config does not say it."""
    given = {
        name: fields[name]
        for name in ("partial_rotary_factor", "rotary_pct")
        if fields.get(name) is not None
    }
    values = list(given.items())
    if len(values) == 2 and values[0][1] != values[1][1]:
        raise contradiction(*values[0], *values[1], source)
    return values[0][1] if values else None


def _typed(parameters: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return parameters with the type under both of its names, ``type`` and ``rope_type``."""
    result = {name: value for name, value in parameters.items() if value is not None}
    old, new = result.get("type"), result.get("rope_type")
    for name, value in (("type", old), ("rope_type", new)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{source}: {name} of RoPE must be a name, not {value!r}"[:200])
    if old is not None and new is not None and _kind(old) != _kind(new):
        raise contradiction("rope_type", new, "type", old, source)
    if (given := old if old is not None else new) is not None:
        # mlx-lm knows 'mrope', which is 'default' for text.
        result["rope_type"] = result["type"] = given if _kind(given) != "default" else "default"
    for name, value in result.items():
        if name in _NUMBERS and not is_number(value):
            raise UsageError(f"{source}: {name} of RoPE must be a number, not {value!r}"[:200])
    factor: Any = result.get("factor")
    if is_number(factor) and factor != 1 and _kind(given) in (None, "default"):
        raise UsageError(
            f"{source}: RoPE has factor {factor}, but no type that says how it scales"[:200],
            CONFIG_HINT,
        )
    if is_number(factor) and not 0 < factor < _FACTOR_LIMIT:
        raise UsageError(f"{source}: the factor of RoPE must be positive and finite, not {factor}")
    if _kind(given) == "linear" and is_number(result.get("factor")):
        result["factor"] = float(result["factor"])  # three classes require a float
    return result


def _kind(name: str | None) -> str | None:
    return None if name is None else TYPE_ALIASES.get(name, name)


def _merged(parts: tuple[Mapping[str, Any], ...], source: str) -> dict[str, Any]:
    """Merge statements from several places; refuse those that differ."""
    places = ("the top level", "rope_parameters", "rope_scaling")
    result: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, part in zip(places, parts, strict=True):
        for name, value in part.items():
            if value is None:
                continue
            if name in result and result[name] != value:
                if name in ("type", "rope_type") and _kind(result[name]) == _kind(value):
                    continue
                raise contradiction(f"{name} at {origin[name]}", result[name], place, value, source)
            result[name], origin[name] = value, place
    return result


def _take_original_length(fields: Mapping[str, Any], parameters: dict[str, Any]) -> None:
    """Add the trained context length, which Phi-3 keeps outside and others leave out."""
    kinds = ("llama3", "yarn", "longrope")
    if _kind(parameters.get("rope_type", parameters.get("type"))) not in kinds:
        return
    for name in ("original_max_position_embeddings", "max_position_embeddings"):
        if is_number(fields.get(name)):
            parameters.setdefault("original_max_position_embeddings", fields[name])


def _write_flat(fields: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Write RoPE as transformers 4 did: theta, scaling and rotated part on their own."""
    for name in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(name) is not None and not isinstance(fields.get(name), list):
            fields[name] = parameters[name]
    outside = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    scaling = {name: value for name, value in parameters.items() if name not in outside}
    scaled = _kind(parameters.get("rope_type")) != "default" or "alpha" in scaling
    fields["rope_scaling"] = scaling if scaled else None


def _write_renamed(
    fields: dict[str, Any], main: Mapping[str, Any], sliding: Mapping[str, Any] | None
) -> None:
    """Write the fields that a model type has names of its own for."""
    attention = fields.get("attn_config")
    if isinstance(attention, dict) and main.get("rope_theta") is not None:
        attention.setdefault("rope_theta", main["rope_theta"])
    for standard, name in _RENAMED.get(str(fields.get("model_type")), {}).items():
        if standard == "sliding":
            value = None if sliding is None else sliding.get("rope_theta")
        elif standard == "rotary_dim":
            factor: Any = main.get("partial_rotary_factor")
            head: Any = fields.get("head_dim")
            value = int(head * factor) if is_number(factor) and is_number(head) else None
        else:
            value = main.get(standard)
        if value is not None and fields.get(name) is None:
            fields[name] = value
