"""Compare the defaults of mlx-lm's argument classes with those of transformers' config classes.

    python -m benchmarks.config_defaults > FILE     # JSON: model type -> field -> both defaults

A config that lacks such a field runs with another value in mlx-lm than its authors meant. Only
fields that both classes declare with a default are compared; those of ``_WITHOUT_EFFECT`` change
no result of inference.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from k2cli.models.class_defaults import DEFAULTS_DIFFER

_WITHOUT_EFFECT = frozenset({
    # Sizes that k2 requires or that the tensors give, names, and RoPE, which has its own check.
    "model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "torch_dtype", "dtype",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "quantization",
    "quantization_config", "initializer_range", "use_cache", "text_config", "vision_config",
    "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "router_aux_loss_coef",
    "attention_dropout", "max_seq_len", "max_sequence_length", "image_token_id", "video_token_id",
    "image_token_index", "num_nextn_predict_layers", "head_dim", "pretraining_tp",
})  # fmt: skip


def differences(model_type: str) -> dict[str, tuple[Any, Any]]:
    """Return the fields of a model type whose defaults differ: transformers' and mlx-lm's."""
    from transformers import CONFIG_MAPPING

    from k2cli.sharding.architectures import model_classes

    _, arguments = model_classes({"model_type": model_type})
    if model_type not in CONFIG_MAPPING or not dataclasses.is_dataclass(arguments):
        return {}
    theirs = CONFIG_MAPPING[model_type]()
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(arguments):
        if field.name in _WITHOUT_EFFECT or not hasattr(theirs, field.name):
            continue
        if field.default is not dataclasses.MISSING:
            ours = field.default
        elif field.default_factory is not dataclasses.MISSING:
            ours = field.default_factory()
        else:
            continue
        other = getattr(theirs, field.name)
        # A default of None is computed from other fields; what the instance has is that result.
        plain = (bool, int, float, str)
        if isinstance(ours, plain) and isinstance(other, plain) and ours != other:
            found[field.name] = (other, ours)
        elif isinstance(ours, plain) and other is None and ours not in (0, False):
            found[field.name] = (None, ours)
    return found


_SECTION = """\
## Fields whose defaults differ

For 137 model types of mlx-lm 0.32.2, the defaults of its argument classes were compared with those
of transformers 5.24.0, where that has a class (`python -m benchmarks.config_defaults`). A config
that lacks one of these fields is refused, and the error names the field and both values. Left out
are fields without effect on the result, `tie_word_embeddings` (the tensors tell), and DeepSeek's
`n_routed_experts` (null is a dense model). transformers has no class for Kimi K2's types
and `joyai_llm_flash`; mlx-lm computes them with DeepSeek-V3's class, whose row counts for them.
"""


def section() -> list[str]:
    """Return the lines of the page's section: fields by model type, with both defaults."""
    lines = [
        _SECTION,
        "| Model type | Field | transformers | mlx-lm |",
        "| --- | --- | --- | --- |",
    ]
    for model_type, fields in DEFAULTS_DIFFER.items():
        for name, (theirs, ours) in fields.items():
            lines.append(f"| `{model_type}` | `{name}` | {theirs} | {ours} |")
    return lines


def main() -> int:
    """Print the table of all model types that both have."""
    from benchmarks.model_types import supported_model_types

    table, compared = {}, 0
    for model_type in supported_model_types():
        try:
            found = differences(model_type)
        except Exception as error:  # the classes of some types cannot be made without a config
            sys.stderr.write(f"{model_type}: {type(error).__name__}: {error}\n"[:200])
            continue
        compared += 1
        if found:
            table[model_type] = found
    sys.stderr.write(f"{compared} model types\n")
    json.dump(table, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
