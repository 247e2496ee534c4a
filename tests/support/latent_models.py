"""Small models with latent attention and random weights, and decisions for one rank of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.rank.attention.latent import use_own_attention
from k2cli.rank.executor import Executor
from k2cli.sharding.assemble import build, cast
from k2cli.sharding.latent_ways import LatentSettings
from k2cli.sharding.stage import cut_stage
from lab.toy_k2.checkpoint import ToyShape, toy_config

SMALL = ToyShape(
    layers=2, hidden=64, heads=4, dense_intermediate=64, expert_intermediate=32, experts=4,
    vocabulary=320, bits=None,
)  # fmt: skip
SPARSE: dict[str, Any] = toy_config(SMALL) | {
    "model_type": "deepseek_v32", "index_n_heads": 4, "index_head_dim": 64, "index_topk": 24,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "kimi_k2": toy_config(SMALL),
    "4 bit": toy_config(replace(SMALL, bits=4)),
    "no q_lora": toy_config(SMALL) | {"q_lora_rank": None},
    "kimi_k25": {
        "model_type": "kimi_k25",
        "text_config": toy_config(SMALL) | {"model_type": "kimi_k2"},
    },
    "deepseek_v32": SPARSE,
}
MLX_LM = LatentSettings(0.0)
"""Settings with which every step is mlx-lm's own."""
TOKENS = [7 + index * 31 % 300 for index in range(200)]
"""A prompt whose tokens all of these models have."""


def latent_model(name: str) -> nn.Module:
    """Make one of ``CONFIGS``, the same each time."""
    mx.random.seed(3)
    config = CONFIGS[name]
    model = build(config)
    if "quantization" in config:
        nn.quantize(model, group_size=32, bits=4)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    return model


class Requests:
    """Decisions on one rank, with the logits of each decode step."""

    def __init__(self, model: nn.Module, settings: LatentSettings) -> None:
        use_own_attention(model, settings)
        self.executor = Executor(cut_stage(model, 0, 2), None)
        self._step = 0

    def do(self, kind: Any, *arguments: Any, **fields: Any) -> mx.array | None:
        self._step += 1
        return self.executor.carry_out(kind(self._step, *arguments, **fields)).logits
