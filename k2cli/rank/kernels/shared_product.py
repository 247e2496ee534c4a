"""Product of few rows with one quantized matrix that they share: a CUDA kernel on tensor cores.

MLX 0.32 reads the weights of one row at a quarter of an H200's speed. Here each warp multiplies 64
inputs of 32 outputs by up to 8 rows at a time, and warps of a block add up their parts of the
inputs.

A 4-bit value is put into the low bits of a bfloat16's mantissa, which makes it 128 + q exactly
(1,024 + q in float16). The same product with ones gives the sum of the inputs, and with that scale
and bias of a group count once per group, in float32; weights are never rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from k2cli.rank.kernels.cuda_text import AS_FLOAT, shortened

DTYPES = (mx.bfloat16, mx.float16)
"""Types of the inputs that the kernel knows."""
_BITS = 4
_GROUPS = (32, 64, 128)
_INPUTS = 64
"""Inputs that a warp multiplies at a time."""
_TILE = 32
"""Outputs of a block."""
_LANES = 256
_ROWS = 8
"""Rows of one tensor-core operation."""
MOST_ROWS = 16
"""Rows up to which the kernel is faster than MLX's for one matrix of rows (measured on an H200)."""

_HEADER = """
namespace k2 {

template <typename T>
struct Packed;

template <>
struct Packed<__nv_bfloat16> {
  static constexpr uint32_t ones = 0x3f803f80u;
  static constexpr uint32_t magic = 0x43004300u;
  static constexpr float offset = 128.0f;
  static __device__ __forceinline__ void multiply(
      float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Packed<__half> {
  static constexpr uint32_t ones = 0x3c003c00u;
  static constexpr uint32_t magic = 0x64006400u;
  static constexpr float offset = 1024.0f;
  static __device__ __forceinline__ void multiply(
      float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Read 8 values and pair each with the one 4 places after it, as nibbles of a word are paired.
template <typename T>
__device__ __forceinline__ void load_pairs(const T* from, bool aligned, uint32_t* pairs) {
  uint4 words;
  if (aligned) {
    words = *reinterpret_cast<const uint4*>(from);
  } else {
    T* values = reinterpret_cast<T*>(&words);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = from[i];
  }
  pairs[0] = __byte_perm(words.x, words.z, 0x5410);
  pairs[1] = __byte_perm(words.x, words.z, 0x7632);
  pairs[2] = __byte_perm(words.y, words.w, 0x5410);
  pairs[3] = __byte_perm(words.y, words.w, 0x7632);
}

}  // namespace k2
"""

_SOURCE = """
  using T = cuda::std::remove_reference_t<decltype(*out)>;
  using P = k2::Packed<T>;
  constexpr int WARPS = 8;
  constexpr int HALVES = GROUP == 32 ? 2 : 1;  // groups in 64 inputs, at least one

  const int rows = x_shape[0];
  const int inputs = x_shape[1];
  const int outputs = weight_shape[0];
  const int words = weight_shape[1];
  const int groups = scales_shape[1];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int of_row = lane / 4;  // of 8 outputs, and of 8 rows of x
  const int of_inputs = lane % 4;
  const int first = blockIdx.x * 32;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && inputs % 8 == 0;

  // Four outputs of each lane: two in each of two operations.
  const uint32_t* weights[4];
  int64_t group_offsets[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t output = min(first + i * 8 + of_row, outputs - 1);
    weights[i] = weight + output * words;
    group_offsets[i] = output * groups;
  }
  const T* of_x[TILES];
  bool present[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int row = tile * 8 + of_row;
    present[tile] = row < rows;
    of_x[tile] = x + int64_t(present[tile] ? row : 0) * inputs;
  }

  float sums[2][TILES][4] = {};
#pragma unroll 2
  for (int step = warp; step < inputs / 64; step += WARPS) {
    uint32_t read[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (GROUP == 32) {
        read[i][0] = __ldcs(weights[i] + step * 8 + of_inputs);
        read[i][1] = __ldcs(weights[i] + step * 8 + 4 + of_inputs);
      } else {
        const uint2 both =
            __ldcs(reinterpret_cast<const uint2*>(weights[i] + step * 8 + of_inputs * 2));
        read[i][0] = both.x;
        read[i][1] = both.y;
      }
    }
    float scale[4][HALVES];
    float bias[4][HALVES];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int64_t group = group_offsets[i] + (step * 64 + half * 32) / GROUP;
        scale[i][half] = k2::as_float(scales[group]);
        bias[i][half] = k2::as_float(biases[group]) - P::offset * scale[i][half];
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      uint32_t pairs[2][4] = {};
      if (present[tile]) {
        const T* from = of_x[tile] + step * 64;
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int place = GROUP == 32 ? word * 32 + of_inputs * 8 : of_inputs * 16 + word * 8;
          k2::load_pairs(from + place, aligned, pairs[word]);
        }
      }
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        float products[2][4] = {};
        float totals[4] = {};
#pragma unroll
        for (int word = half * 2 / HALVES; word < (half + 1) * 2 / HALVES; ++word) {
#pragma unroll
          for (int pair = 0; pair < 4; pair += 2) {
            const uint32_t b0 = pairs[word][pair];
            const uint32_t b1 = pairs[word][pair + 1];
            const uint32_t ones[4] = {P::ones, P::ones, P::ones, P::ones};
            P::multiply(totals, ones, b0, b1);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
              const uint32_t upper = read[part * 2][word] >> (pair * 4);
              const uint32_t lower = read[part * 2 + 1][word] >> (pair * 4);
              const uint32_t a[4] = {
                  (upper & 0x000f000fu) | P::magic,
                  (lower & 0x000f000fu) | P::magic,
                  ((upper >> 4) & 0x000f000fu) | P::magic,
                  ((lower >> 4) & 0x000f000fu) | P::magic};
              P::multiply(products[part], a, b0, b1);
            }
          }
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int which = part * 2 + i / 2;
            sums[part][tile][i] +=
                scale[which][half] * products[part][i] + bias[which][half] * totals[i];
          }
        }
      }
    }
  }

  // Every lane has outputs (of_row, of_row + 8) by rows (2 * of_inputs, 2 * of_inputs + 1).
  __shared__ float shared[WARPS][8][33];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    __syncthreads();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = part * 16 + i / 2 * 8 + of_row;
        shared[warp][of_inputs * 2 + i % 2][output] = sums[part][tile][i];
      }
    }
    __syncthreads();
    const int output = threadIdx.x % 32;
    const int row = threadIdx.x / 32;
    float result = 0.0f;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) result += shared[other][row][output];
    const int at = tile * 8 + row;
    if (at < rows && first + output < outputs) {
      out[int64_t(at) * outputs + first + output] = static_cast<T>(result);
    }
  }
"""


def is_known(arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """True if the kernel can multiply by a matrix.

    Args:
        arrays: ``weight`` ``[outputs, packed inputs]``, ``scales`` and ``biases`` ``[outputs,
            groups]``.
        settings: ``group_size``, ``bits`` and ``mode``.
    """
    group_size, bits = settings["group_size"], settings["bits"]
    if settings["mode"] != "affine" or bits != _BITS or group_size not in _GROUPS:
        return False
    if arrays.get("biases") is None or arrays["weight"].ndim != 2:
        return False
    inputs: int = arrays["scales"].shape[1] * group_size
    return inputs % _INPUTS == 0


def shared_product(x: mx.array, arrays: Mapping[str, mx.array], group_size: int) -> mx.array:
    """Multiply ``x`` by a matrix for which ``is_known``.

    Args:
        x: ``[rows, inputs]``, at most ``MOST_ROWS``, of one of ``DTYPES``.

    Returns:
        ``[rows, outputs]``, of the type of ``x``.
    """
    rows, outputs = x.shape[0], arrays["weight"].shape[0]
    product: mx.array = _kernel(group_size, -(-rows // _ROWS))(
        inputs=[x, arrays["weight"], arrays["scales"], arrays["biases"]],
        grid=(-(-outputs // _TILE) * _LANES, 1, 1),
        threadgroup=(_LANES, 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )[0]
    return product


@functools.cache
def _kernel(group_size: int, tiles: int) -> Any:
    """Make the kernel; sizes of matrices are arguments, so that one is enough for all."""
    constants = f"constexpr int GROUP = {group_size};\nconstexpr int TILES = {tiles};\n"
    return mx.fast.cuda_kernel(
        name="k2_shared_product",
        input_names=["x", "weight", "scales", "biases"],
        output_names=["out"],
        source=constants + shortened(_SOURCE),
        header=shortened(AS_FLOAT + _HEADER),
        ensure_row_contiguous=True,
    )
