"""Fields that transformers' code reads and mlx-lm's class of the same model type does not.

Each of them can make a model run with other numbers than its authors meant. Those that do are
handled in ``k2cli.sharding.unread_fields``, ``k2cli.planning.config_check`` and
``k2cli.models.config_form``; ``REVIEWED`` has them, and those that change nothing.

    python -m benchmarks.unread_fields      lists them by model type
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.sharding.architectures import class_source

_HANDLED = """
attention_chunk_size attn_temperature_tuning decoder_sparse_step floor_scale attn_scale
hidden_act hidden_activation activation_function mlp_hidden_act mamba_hidden_act ffn_act_fn
layer_norm_epsilon layer_types mlp_layer_types mlp_only_layers moe_layers no_rope_layers
norm_topk_prob q_lora_rank residual_gate_temperature rope_interleave
scale_attn_by_inverse_layer_idx scale_attn_weights sliding_window sliding_window_pattern
attn_logit_softcapping clip_qkv final_logit_softcapping logits_scaling
swiglu_alpha swiglu_limit use_bidirectional_attention use_sliding_window tie_word_embeddings
"""
_OTHER_NAMES = """
layers_block_type layers_num_experts linear_conv_kernel_dim linear_head_dim linear_num_heads
max_seq_len n_shared_experts num_experts_per_tok num_local_experts num_mtp_layers
"""
_SIZES_AND_STARTING_VALUES = """
block_size chunk_size final_w_init_variance_scale linear_a_log_max linear_a_log_min
linear_dt_init_floor linear_dt_max linear_dt_min mamba_chunk_size mamba_expand
rescale_prenorm_residual time_step_floor time_step_init_scheme time_step_max time_step_min
time_step_scale use_associative_scan use_mamba_kernels use_mambapy w_init_variance_scale
"""
_PRECISION_TRAINING_AND_OUTPUT = """
add_cross_attention attention_softmax_in_fp32 emb_pdrop kv_sharing_modes moe_jitter_eps moe_norm_min
num_logits_to_keep per_layer_config reorder_and_upcast_attn residual_in_fp32
scale_attention_softmax_in_fp32 summary_activation summary_first_dropout summary_last_dropout
summary_proj_to_labels summary_type summary_use_proj vocab_offset
"""
_PICTURES_AND_SOUNDS = """
audio_config audio_soft_tokens_per_image audio_token_id gradient_clipping image_token_id
num_channels output_proj_dims patch_size projector_hidden_size standardize use_clipped_linears
video_token_id vision_config vision_soft_tokens_per_image
"""
_OTHER_ARCHITECTURES = """
full_attn_alpha_factor full_attn_beta_factor indexer_types kda_lower_bound kda_safe_gate
linear_attn_alpha_factor linear_attn_beta_factor mlp_alpha_factor mlp_beta_factor
"""
"""Of models that have the type's name, and tensors that mlx-lm's class does not take."""

REVIEWED = frozenset(
    " ".join(
        (_HANDLED, _OTHER_NAMES, _SIZES_AND_STARTING_VALUES, _PRECISION_TRAINING_AND_OUTPUT,
         _PICTURES_AND_SOUNDS, _OTHER_ARCHITECTURES)
    ).split()
)  # fmt: skip

_COMMON_FIELDS = """
_attn_implementation _attn_implementation_internal _experts_implementation attention_dropout
attention_probs_dropout_prob attn_implementation attn_pdrop bos_token_id chunk_size_feed_forward
classifier_dropout dtype embd_dropout embd_pdrop embedding_dropout eos_token_id get_text_config
gradient_checkpointing hidden_dropout hidden_dropout_prob hidden_size initializer_range
input_jitter_noise is_decoder layerdrop max_position_embeddings model_type name_or_path
num_attention_heads num_hidden_layers num_labels output_attentions output_hidden_states
output_router_logits pad_token_id pretraining_tp problem_type resid_dropout resid_pdrop
residual_dropout return_dict rms_norm_eps rope_parameters router_aux_loss_coef router_jitter_noise
standardize_rope_params text_config to_dict torch_dtype use_cache use_return_dict vocab_size
"""
_COMMON = frozenset(_COMMON_FIELDS.split())
_READ = re.compile(r"(?<!vision_)(?<!audio_)config\.(\w+)|getattr\(\s*(?:self\.)?config, \"(\w+)\"")
_NOT_OF_TEXT = re.compile(r"^class \w*(Vision|Audio|Video|Patch|Projector|MultiModal)\w*\(")


def unread_fields(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the fields by model type, for types that have a class in both libraries."""
    found = {}
    for model_type, config in configs.items():
        text = config.get("text_config")
        own = text.get("model_type") if isinstance(text, Mapping) else None
        read = set(_read_by_transformers(str(own or model_type)))
        try:
            source = class_source(config)
        except (K2Error, OSError):
            continue
        fields = sorted(name for name in read - _COMMON if name not in source)
        if fields:
            found[model_type] = fields
    return found


def _read_by_transformers(model_type: str) -> Iterator[str]:
    """Yield the fields that the classes of a language model read."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return
    models = Path(spec.origin).parent / "models"
    name = model_type.replace("-", "_")
    folders = [models / name, models / name.removesuffix("_text")]
    for file in next((each for each in folders if each.is_dir()), models / name).glob("modeling_*"):
        for part in re.split(r"(?m)^(?=class )", file.read_text(encoding="utf-8")):
            if not _NOT_OF_TEXT.match(part):
                for one, other in _READ.findall(part):
                    yield one or other


if __name__ == "__main__":
    from benchmarks.architectures import recorded

    for kind, names in unread_fields({n: c for n, (_, c) in recorded().items()}).items():
        print(kind, *[name for name in names if name not in REVIEWED])  # noqa: T201
