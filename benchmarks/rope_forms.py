"""Make docs/measurements/config-forms.md: the old and the new form of every architecture's config.

    scripts/rope-forms            # write the page
    scripts/rope-forms --check    # 1 if the page is not up to date

The recorded configs (benchmarks/data/architectures.json) are written as transformers 4 wrote them
and as transformers 5 does, once as recorded with another theta, and once with YaRN. Both are read
as k2 reads them, and the RoPE modules of the two built models are compared. Where transformers
knows the model type, its own class writes the new form.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.architectures import recorded
from benchmarks.config_defaults import section
from k2cli.errors import K2Error
from k2cli.models.config_form import standard_config
from k2cli.models.rope_form import rope_by_layer_type

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "measurements" / "config-forms.md"

THETA, SLIDING_THETA = 123456.0, 7654.0
"""Bases that no class has as its default."""

YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
}

_OLD_NAMES = (
    "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct",
    "rope_freq_constant", "rope_embedding_base", "rope_local_base_freq", "rope_local_theta",
    "swa_rope_theta",
)  # fmt: skip
_SLIDING_NAMES = {
    "gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq",
    "gemma3": "rope_local_base_freq", "gemma3n": "rope_local_base_freq",
    "gear": "rope_local_base_freq", "plamo3": "rope_local_theta", "mimo_v2_flash": "swa_rope_theta",
}  # fmt: skip
_BASE_NAMES = {
    "gpt_neox": "rotary_emb_base", "openelm": "rope_freq_constant",
    "phi3small": "rope_embedding_base",
}  # fmt: skip
_MISWRITTEN = ("olmo3",)
"""Types for which transformers 5 forgets a theta: it takes it for full attention and then has none
left for the layers with a sliding window."""


@dataclass(frozen=True, slots=True)
class Forms:
    """Result for one architecture: what became of each variant, and who wrote the new form."""

    writer: str
    plain: str
    yarn: str


def walk(model_type: str, config: Mapping[str, Any]) -> Forms:
    """Compare the two forms of an architecture's config, and of the same with YaRN."""
    try:
        modules = _built(config)
    except K2Error as error:
        return Forms("-", f"refused: {error.message}", "")
    if not modules:
        return Forms("-", "has no RoPE", "")
    writer, plain = _compared(model_type, _old_form(config, None))
    _, yarn = _compared(model_type, _old_form(config, YARN))
    return Forms(writer, plain, yarn)


def _compared(model_type: str, old: dict[str, Any]) -> tuple[str, str]:
    new, writer = _new_form(old)
    said: list[str] = []
    built: list[dict[str, Any]] = []
    for form in (old, new):
        try:
            built.append(_built(form))
        except K2Error as error:
            said.append(error.message)
    if len(said) == 2:
        return writer, f"refused: {_stable(said[0])}"
    if said:
        return writer, f"DIFFERENT: one form is refused: {said[0]}"
    one, two = built
    same = one.keys() == two.keys() and all(one[path].is_close(two[path]) for path in one)
    return writer, "equal" if same else "DIFFERENT frequencies"


def _stable(message: str) -> str:
    """Sort the names of a set in mlx-lm's message: their order changes with each process."""
    return re.sub(
        r"\{('[^{}:]*')\}", lambda m: "{" + ", ".join(sorted(m[1].split(", "))) + "}", message
    )


def _built(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotations of a config's model, by path, read as k2 reads it."""
    from k2cli.sharding.assemble import build
    from k2cli.sharding.rope_check import rotations

    with contextlib.redirect_stdout(io.StringIO()):
        model = build(standard_config(config, "config.json"))
    return {path: rotation for path, _, rotation in rotations(model)}


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _old_form(config: Mapping[str, Any], scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write a config with another theta as transformers 4 did."""
    standard = standard_config(config, "config.json")
    text = _text(standard)
    by_type = rope_by_layer_type(text)
    main = dict(by_type.get("full_attention") or by_type.get(None) or {})
    result = copy.deepcopy(dict(config))
    fields = _text(result)
    given = {name for name in _OLD_NAMES if fields.get(name) is not None}
    for name in ("rope_parameters", *_OLD_NAMES):
        fields.pop(name, None)
    model_type = str(fields.get("model_type") or result["model_type"])
    if isinstance(fields.get("attn_config"), dict):
        fields["attn_config"]["rope_theta"] = THETA
    else:
        fields[_BASE_NAMES.get(model_type, "rope_theta")] = THETA
    if (factor := main.get("partial_rotary_factor")) is not None:
        fields["rotary_pct" if "rotary_pct" in given else "partial_rotary_factor"] = factor
    if model_type in _SLIDING_NAMES:
        fields[_SLIDING_NAMES[model_type]] = SLIDING_THETA
    fields["rope_scaling"] = dict(scaling or text.get("rope_scaling") or {}) or None
    return result


def _new_form(old: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Write the same config as transformers 5 does; the second value says who wrote it."""
    result = copy.deepcopy(dict(old))
    fields = _text(result)
    written = _written_by_transformers(fields, str(fields.get("model_type") or old["model_type"]))
    writer = "transformers" if written is not None else "k2"
    parameters = written or _own_new_form(fields)
    for name in _OLD_NAMES:
        fields.pop(name, None)
    if isinstance(fields.get("attn_config"), dict):
        fields["attn_config"].pop("rope_theta", None)
    fields["rope_parameters"] = parameters
    if isinstance(fields.get("torch_dtype"), str):
        fields["dtype"] = fields.pop("torch_dtype")
    return result, writer


def _written_by_transformers(fields: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    """Return ``rope_parameters`` as transformers' class writes them, or None without a class."""
    logging.disable(logging.WARNING)
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING or "attn_config" in fields or model_type in _MISWRITTEN:
        return None
    try:
        written = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(fields))).to_dict()
    except Exception:
        return None  # some classes accept only the sizes of their own models
    parameters = written.get("rope_parameters")
    return parameters if isinstance(parameters, dict) and _says_theta(parameters) else None


def _says_theta(parameters: Mapping[str, Any]) -> bool:
    """True if the class has taken the theta over; some know no RoPE."""
    return THETA in (parameters.get("rope_theta"), *(
        each.get("rope_theta") for each in parameters.values() if isinstance(each, dict)
    ))  # fmt: skip


def _own_new_form(fields: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(fields.get("rope_scaling") or {})
    parameters = {"rope_theta": THETA, "rope_type": "default", **scaling}
    parameters.pop("type", None)
    for name in ("partial_rotary_factor", "rotary_pct"):
        if fields.get(name) is not None:
            parameters["partial_rotary_factor"] = fields[name]
    local = next((fields[n] for n in set(_SLIDING_NAMES.values()) if n in fields), None)
    if local is None:
        return parameters
    sliding = {"rope_theta": local, "rope_type": "default"}
    if "partial_rotary_factor" in parameters:
        sliding["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return {"full_attention": parameters, "sliding_attention": sliding}


# --- the page -----------------------------------------------------------------------------------

_INTRODUCTION = """\
# Old and new forms of a config

<!-- made by scripts/rope-forms -->

transformers 4 wrote RoPE as `rope_theta`, `rope_scaling` and `partial_rotary_factor`;
transformers 5 writes one `rope_parameters`, for some models per type of layer, and `dtype` for
`torch_dtype`. For every model type of the installed mlx-lm the same config was written in both
forms, with a theta that no class has as its default, read as k2 reads it, and built. `equal` means
that all RoPE modules of the two models have the same wavelengths and scales (within 0.02 %), and
that these are the ones that transformers' formulas give; `refused` quotes k2. The column `YaRN` is
the same with `rope_scaling` of type yarn and factor 4. The last column says whose code wrote the
new form.
"""


def page(results: Mapping[str, Forms]) -> str:
    """Return the whole page."""
    lines = [_INTRODUCTION]
    counts = {
        "equal": sum(each.plain == "equal" for each in results.values()),
        "refused": sum(each.plain.startswith("refused") for each in results.values()),
        "without RoPE": sum(each.plain == "has no RoPE" for each in results.values()),
    }
    lines += [", ".join(f"{count} {what}" for what, count in counts.items())
              + f", of {len(results)}.", ""]  # fmt: skip
    lines += ["| Model type | Old and new form | YaRN, old and new form | New form by |"]
    lines += ["| --- | --- | --- | --- |"]
    for name, each in results.items():
        cells = (f"`{name}`", each.plain, each.yarn, each.writer)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", *section()]
    return "\n".join(lines) + "\n"


def results() -> dict[str, Forms]:
    """Walk through all recorded architectures."""
    return {name: walk(name, config) for name, (_, config) in recorded().items()}


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it; 1 if it is not up to date."""
    text = page(results())
    if list(arguments) == ["--check"]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
