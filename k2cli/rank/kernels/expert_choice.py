"""Choice of each row's experts as DeepSeek-V3 routes (Kimi K2 too): one CUDA kernel for few rows.

The sigmoid of each logit is an expert's weight; those with the largest weight plus correction are
chosen. mlx-lm does the same with a dozen small kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from k2cli.rank.kernels.cuda_text import AS_FLOAT, shortened

MOST_EXPERTS = 1024
_WARP = 32

_SOURCE = """
  constexpr int EACH = (EXPERTS + 31) / 32;
  const int lane = threadIdx.x;
  const int64_t row = blockIdx.x;
  float weights[EACH];
  float ranks[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int expert = i * 32 + lane;
    ranks[i] = -INFINITY;
    if (expert < EXPERTS) {
      weights[i] = 1.0f / (1.0f + expf(-k2::as_float(logits[row * EXPERTS + expert])));
      ranks[i] = weights[i] + k2::as_float(correction[expert]);
      // Nothing is larger than what is not a number: an expert must be chosen all the same.
      if (!(ranks[i] > -INFINITY)) ranks[i] = -3.0e38f;
    }
  }
  float total = 0.0f;
  float own_weight = 0.0f;
  for (int choice = 0; choice < CHOICES; ++choice) {
    float best = -INFINITY;
    float weight = 0.0f;
    int expert = EXPERTS - 1;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (ranks[i] > best) {
        best = ranks[i];
        weight = weights[i];
        expert = i * 32 + lane;
      }
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      const float their_best = __shfl_xor_sync(0xffffffffu, best, other);
      const float their_weight = __shfl_xor_sync(0xffffffffu, weight, other);
      const int their_expert = __shfl_xor_sync(0xffffffffu, expert, other);
      if (their_best > best || (their_best == best && their_expert < expert)) {
        best = their_best;
        weight = their_weight;
        expert = their_expert;
      }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (i * 32 + lane == expert) ranks[i] = -INFINITY;
    }
    total += weight;
    if (lane == choice) {
      own_weight = weight;
      experts[row * CHOICES + choice] = expert;
    }
  }
  if (lane < CHOICES) {
    const float divisor = NORMALISED ? total : 1.0f;
    factors[row * CHOICES + lane] = own_weight / divisor * SCALE;
  }
"""


def chosen_experts(
    logits: mx.array, correction: mx.array, *, choices: int, normalised: bool, scale: float
) -> tuple[mx.array, mx.array]:
    """Choose the experts of rows.

    Args:
        logits: ``[rows, experts]``, at most ``MOST_EXPERTS``.
        correction: what is added to an expert's weight for the choice alone, ``[experts]``.
        choices: experts per row, at most 32.
        normalised: divide the weights of a row by their sum.
        scale: factor of all weights.

    Returns:
        The experts and their weights in float32, ``[rows, choices]``.
    """
    rows, experts = logits.shape
    found, factors = _kernel(experts, choices, normalised, float(scale))(
        inputs=[logits, correction],
        grid=(rows * _WARP, 1, 1),
        threadgroup=(_WARP, 1, 1),
        output_shapes=[(rows, choices), (rows, choices)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return found, factors


@functools.cache
def _kernel(experts: int, choices: int, normalised: bool, scale: float) -> Any:
    constants = {"EXPERTS": experts, "CHOICES": choices, "NORMALISED": int(normalised)}
    lines = [f"constexpr int {name} = {value};\n" for name, value in constants.items()]
    lines.append(f"constexpr float SCALE = {scale!r}f;\n")
    return mx.fast.cuda_kernel(
        name="k2_chosen_experts",
        input_names=["logits", "correction"],
        output_names=["experts", "factors"],
        source="".join(lines) + shortened(_SOURCE),
        header=shortened(AS_FLOAT),
        ensure_row_contiguous=True,
    )
