"""Check whether a model's KV cache can be quantized, by running the traced model with one.

No list of architectures is kept: attention that does not go through mlx-lm's
``scaled_dot_product_attention`` fails on quantized keys and values, and so does attention with
sinks. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import UsageError
from k2cli.sharding import trace
from k2cli.sharding.architectures import MODEL_FAILURES
from k2cli.sharding.kv_cache.quantized import (
    QUANTIZED_QUERIES,
    QuantizedCache,
    group_size_of,
    quantized_bytes,
)
from k2cli.sharding.model_errors import explain_failure
from k2cli.sharding.stage import make_cache
from k2cli.sharding.weights_and_cache import head_form
from k2cli.units import format_bytes

KV_BITS = (8, 4)
"""Bits to which keys and values can be quantized."""

_TRIED_LENGTHS = (1, QUANTIZED_QUERIES + 1, 1)


def check_quantizable(
    config: Mapping[str, Any], model: nn.Module, kv_bits: int, tokens: int
) -> None:
    """Check that the plain caches of a traced model can be quantized.

    Args:
        tokens: of all sequences together, for which the bytes are named that MLA would save.

    Raises:
        UsageError: with the reason.
    """
    name = config.get("model_type")
    plain = make_cache(model)
    with trace.running_model(config, "traced"), trace.lazily(model):
        model(mx.zeros((1, 1), dtype=mx.int32), cache=plain)
    _refuse_latent(config, plain, kv_bits, tokens)
    entries = make_cache(model, kv_bits)
    quantized = [entry for entry in entries if isinstance(entry, QuantizedCache)]
    if not quantized:
        kinds = ", ".join(sorted({type(entry).__name__ for entry in entries}))
        raise UsageError(
            f"{name} has no KV cache that --kv-bits could quantize: it keeps {kinds}, and only "
            "plain keys and values of the whole context are quantized",
            "leave out --kv-bits",
        )
    try:
        with trace.lazily(model):
            for length in _TRIED_LENGTHS:
                model(mx.zeros((1, length), dtype=mx.int32), cache=entries)
    except MODEL_FAILURES as error:
        raise UsageError(
            f"the attention of {name} cannot read a quantized KV cache: "
            f"{explain_failure(error, config)}",
            "leave out --kv-bits",
        ) from error


def _refuse_latent(config: Mapping[str, Any], used: list[Any], kv_bits: int, tokens: int) -> None:
    """Refuse latent attention (MLA), whose cache has one small vector for all heads."""
    parts = [part for entry in used for part in getattr(entry, "caches", (entry,))]
    forms = [form for part in parts if (form := head_form(part)) is not None]
    text = config.get("text_config")
    fields = {**config, **text} if isinstance(text, Mapping) else config
    if not fields.get("kv_lora_rank") or any(form.heads > 1 for form in forms):
        return
    held = sum(sum(form.widths) * form.dtype.size for form in forms)
    after = held
    for form in forms:
        try:
            group_size_of(form.widths)
        except UsageError:
            continue
        after -= sum(form.widths) * form.dtype.size
        after += quantized_bytes(form.widths, kv_bits, form.dtype.size)
    raise UsageError(
        f"{config.get('model_type')} has latent attention (MLA), whose KV cache is small already "
        f"and is not quantized: it takes {held:,} bytes per token, and --kv-bits {kv_bits} would "
        f"save {held - after:,} of them, {format_bytes((held - after) * tokens)} for the planned "
        f"{tokens:,} tokens",
        "leave out --kv-bits",
    )
