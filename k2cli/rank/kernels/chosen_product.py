"""Products of few rows with quantized matrices that rows choose (experts, heads): a CUDA kernel.

MLX 0.32's ``gather_qmm`` reads the weights of a few experts at a quarter of a GPU's speed, and is
wrong for some of them (see ``experts``). Here a warp reads whole rows of weights, 16 bytes a lane
at a time, and adds up in float32. A product of a gate and of an up projection, with their
activation, is one launch.

A value of a weight is put at the top of a float's mantissa, which makes it 1 + q / 2^bits without
a conversion; so with the sum of the inputs known, a group of weights costs one shift, one logical
operation and one multiplication with addition per value.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from k2cli.rank.kernels.cuda_text import AS_FLOAT, shortened

BITS = (2, 4, 8)
"""Bits of a weight that the kernel knows: those that divide a word."""
MOST_CHOICES = 16
"""Matrices of a row whose products are added up: the warps of a block."""
_LOAD_BITS = 128
_WARP = 32
_WARPS_PER_BLOCK = 4
_SUMS = 8
"""Sums that one group of lanes has at once, so that they share what they read of a row."""

_HEADER = """
namespace k2 {

// Read COUNT values that lie one after the other, from an address that 16 divides.
template <int COUNT, typename T>
__device__ __forceinline__ void load_values(const T* from, float* values) {
  constexpr int EACH = 16 / sizeof(T);
  static_assert(COUNT % EACH == 0, "whole loads");
#pragma unroll
  for (int load = 0; load < COUNT / EACH; ++load) {
    const uint4 packed = reinterpret_cast<const uint4*>(from)[load];
    const T* unpacked = reinterpret_cast<const T*>(&packed);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      values[load * EACH + i] = as_float(unpacked[i]);
    }
  }
}

// Read 16 bytes of weights, which no other block will read: they need not stay in the cache.
__device__ __forceinline__ uint4 load_weights(const uint32_t* from) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

// Add x[i] * (1 + q[i] / 2^BITS) for the values q of a word to a sum.
template <int BITS>
__device__ __forceinline__ float add_word(uint32_t word, const float* x, float sum) {
  constexpr uint32_t mask = ((1u << BITS) - 1u) << (23 - BITS);
#pragma unroll
  for (int i = 0; i < 32 / BITS; ++i) {
    const int shift = 23 - BITS - i * BITS;
    const uint32_t shifted = shift >= 0 ? word << shift : word >> -shift;
    sum = fmaf(x[i], __uint_as_float((shifted & mask) | 0x3f800000u), sum);
  }
  return sum;
}

}  // namespace k2
"""

_SOURCE = """
  using T = cuda::std::remove_reference_t<decltype(*out)>;
  using SCALE = cuda::std::remove_reference_t<decltype(*scales0)>;
  constexpr int VALUES = 128 / BITS;  // of 16 bytes of weights
  constexpr int CHUNKS = INPUTS / VALUES;
  constexpr int TILE = EACH * (32 / LANES);  // outputs of a warp
  constexpr int MATRICES = GATED ? 2 : 1;
  constexpr int SUMS = MATRICES * EACH;
  constexpr float STEPS = float(1 << BITS);

  // A warp has a tile of outputs of one pair of a row and a matrix; the warps of a block have
  // consecutive tiles, or, where the matrices of a row are added up, one matrix each.
  const int lane = threadIdx.x % 32;
  const int within = lane % LANES;
  const int warp =
      COMBINED ? blockIdx.x : (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (warp * TILE >= OUTPUTS) return;
  const int first = warp * TILE + (lane / LANES) * EACH;
  const int choices = chosen_shape[1];
  const int pair = COMBINED ? blockIdx.y * choices + threadIdx.x / 32 : blockIdx.y;
  const int row = pair / choices;
  const int column = pair % choices;
  const int64_t matrix = chosen[row * chosen_strides[0] + column * chosen_strides[1]];
  const int64_t step = x_strides[1];
  const auto* inputs = x + (ROW_PER_PAIR ? pair : row) * x_strides[0];
  const bool aligned =
      step == 1 && reinterpret_cast<uintptr_t>(inputs) % 16 == 0;

  const uint32_t* weights[MATRICES];
  SCALE* scales[MATRICES];
  SCALE* biases[MATRICES];
#pragma unroll
  for (int which = 0; which < MATRICES; ++which) {
    int output = first + which * OUTPUTS;
    int64_t of_part;
    const uint32_t* weight;
    SCALE* scale;
    SCALE* bias;
    CHOOSE_PART
    weights[which] = weight + of_part * WORDS;
    scales[which] = scale + of_part * GROUPS;
    biases[which] = bias + of_part * GROUPS;
  }

  float sums[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;

#pragma unroll 1
  for (int chunk = within; chunk < CHUNKS; chunk += LANES) {
    uint4 words[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
      words[i] = k2::load_weights(weights[i / EACH] + (i % EACH) * WORDS + chunk * 4);
    }
    float values[VALUES];
    if (aligned) {
      k2::load_values<VALUES>(inputs + chunk * VALUES, values);
    } else {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        values[i] = k2::as_float(inputs[(chunk * VALUES + i) * step]);
      }
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) total += values[i];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
      const int group = (i % EACH) * GROUPS + chunk * VALUES / GROUP;
      const float scale = k2::as_float(scales[i / EACH][group]) * STEPS;
      const float bias = k2::as_float(biases[i / EACH][group]);
      float sum = 0.0f;
      sum = k2::add_word<BITS>(words[i].x, values, sum);
      sum = k2::add_word<BITS>(words[i].y, values + VALUES / 4, sum);
      sum = k2::add_word<BITS>(words[i].z, values + VALUES / 2, sum);
      sum = k2::add_word<BITS>(words[i].w, values + VALUES / 4 * 3, sum);
      sums[i] += scale * (sum - total) + bias * total;
    }
  }

#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) {
      sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], other);
    }
  }
#if COMBINED
  __shared__ float shared[MOST_CHOICES][TILE];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (within == i % LANES) shared[column][(lane / LANES) * EACH + i] = sums[i];
  }
  __syncthreads();
  for (int output = threadIdx.x; output < TILE; output += blockDim.x) {
    float result = 0.0f;
    for (int i = 0; i < choices; ++i) {
      result += shared[i][output] * factors[row * factors_strides[0] + i * factors_strides[1]];
    }
    out[int64_t(row) * OUTPUTS + warp * TILE + output] = static_cast<T>(result);
  }
#else
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (within == i % LANES) {
      float result = sums[i];
      if (GATED) {
        result = result / (1.0f + __expf(-result)) * sums[(MATRICES - 1) * EACH + i];
      }
      out[int64_t(pair) * OUTPUTS + first + i] = static_cast<T>(result);
    }
  }
#endif
"""


def is_known(
    parts: Sequence[Mapping[str, mx.array]],
    settings: Mapping[str, Any],
    inputs: int,
    *,
    gated: bool = False,
) -> bool:
    """True if the kernel can multiply by these matrices.

    Args:
        inputs: inputs that count; the matrices may have more.
        gated: see ``chosen_product``.
        parts: parts along the outputs; ``weight``, ``scales`` and ``biases`` of each, ``[matrices,
            outputs, packed inputs or groups]``.
        settings: ``group_size``, ``bits``, ``mode`` and perhaps ``global_scale``.
    """
    group_size, bits = settings["group_size"], settings["bits"]
    if settings["mode"] != "affine" or bits not in BITS or settings.get("global_scale") is not None:
        return False
    values = _LOAD_BITS // bits
    if group_size % values or inputs % values or any(part.get("biases") is None for part in parts):
        return False
    widths = [part["weight"].shape[1] for part in parts]
    if gated:
        widths.append(sum(widths) // 2)
    return all(width % _tile(inputs, bits, gated) == 0 for width in widths)


def chosen_product(
    x: mx.array,
    chosen: mx.array,
    parts: Sequence[Mapping[str, mx.array]],
    settings: Mapping[str, Any],
    *,
    gated: bool = False,
    factors: mx.array | None = None,
) -> mx.array:
    """Multiply rows by the matrices that they choose.

    Args:
        x: ``[rows, inputs]``, of which each row has all its choices, or ``[rows * choices,
            inputs]``; of any strides.
        chosen: the matrices of each row, ``[rows, choices]``, of any strides.
        parts, settings: see ``is_known``, which must be true; contiguous and evaluated.
        gated: the first half of the outputs is a gate's and the second one what it lets pass;
            returned is ``silu(gate) * second``.
        factors: ``[rows, choices]`` in float32, of any strides; the products of a row, each times
            its factor, are then added up, in float32. Of ``MOST_CHOICES`` at most, and not gated.

    Returns:
        ``[rows * choices, outputs]``, or ``[rows, outputs]`` with factors, of the type of ``x``.
    """
    rows, choices = chosen.shape
    pairs = rows * choices
    first = parts[0]
    form = _Form(
        x.dtype,
        first["scales"].dtype,
        settings["bits"],
        settings["group_size"],
        inputs=x.shape[1],
        words=first["weight"].shape[2],
        widths=tuple([part["weight"].shape[1] for part in parts]),
        gated=gated,
        row_per_pair=choices > 1 and x.shape[0] == pairs,
        combined=factors is not None,
    )
    kernel, outputs, tiles = _kernel(form)
    arrays = [part[name] for part in parts for name in ("weight", "scales", "biases")]
    if factors is None:
        inputs, count, warps = [x, chosen], pairs, min(_WARPS_PER_BLOCK, tiles)
        lanes = -(-tiles // warps) * warps * _WARP
    else:
        inputs, count, warps, lanes = [x, chosen, factors], rows, choices, tiles * choices * _WARP
    product: mx.array = kernel(
        inputs=[*inputs, *arrays],
        grid=(lanes, count, 1),
        threadgroup=(warps * _WARP, 1, 1),
        output_shapes=[(count, outputs)],
        output_dtypes=[x.dtype],
    )[0]
    return product


class _Form(NamedTuple):
    """All that the text of a kernel depends on.

    ``words`` are those of an output's weights, which may be more than those of ``inputs``, and
    ``widths`` the outputs of each part.
    """

    dtype: mx.Dtype
    scales_dtype: mx.Dtype
    bits: int
    group_size: int
    inputs: int
    words: int
    widths: tuple[int, ...]
    gated: bool
    row_per_pair: bool
    combined: bool


def _lanes(inputs: int, bits: int) -> int:
    """Return the lanes of a warp that share an output: a power of two, all of which have work."""
    chunks = inputs * bits // _LOAD_BITS
    return min(_WARP, 1 << (chunks.bit_length() - 1))


def _each(inputs: int, bits: int, gated: bool) -> int:
    """Return the outputs that a group of lanes computes at once; fewer of short rows."""
    return _SUMS if _lanes(inputs, bits) == _WARP and not gated else _SUMS // 2


def _tile(inputs: int, bits: int, gated: bool) -> int:
    """Return the outputs of a warp; those of a part must be a multiple."""
    return _each(inputs, bits, gated) * (_WARP // _lanes(inputs, bits))


@functools.cache
def _kernel(form: _Form) -> tuple[Any, int, int]:
    """Make a kernel; return it with its outputs, and the tiles of these.

    Sizes are constants of its text and not arguments, as MLX would make the text anew for every
    call.
    """
    outputs = sum(form.widths) // (2 if form.gated else 1)
    constants = {
        "BITS": form.bits,
        "GROUP": form.group_size,
        "INPUTS": form.inputs,
        "OUTPUTS": outputs,
        "WORDS": form.words,
        "GROUPS": form.words * 32 // form.bits // form.group_size,
        "LANES": _lanes(form.inputs, form.bits),
        "EACH": _each(form.inputs, form.bits, form.gated),
        "GATED": int(form.gated),
        "ROW_PER_PAIR": int(form.row_per_pair),
    }
    names = ["x", "chosen", "factors"] if form.combined else ["x", "chosen"]
    choice, before = [], 0
    for index, width in enumerate(form.widths):
        names += [f"weight{index}", f"scales{index}", f"biases{index}"]
        before += width
        condition = f"if (output < {before}) " if index < len(form.widths) - 1 else ""
        choice.append(
            f"{condition}{{ of_part = matrix * {width} + output - {before - width}; "
            f"weight = weight{index}; scale = scales{index}; bias = biases{index}; }}"
        )
    text = _SOURCE.replace("CHOOSE_PART", " else ".join(choice))
    text = "".join(f"constexpr int {name} = {value};\n" for name, value in constants.items()) + text
    defined = f"#define COMBINED {int(form.combined)}\n#define MOST_CHOICES {MOST_CHOICES}\n"
    kernel = mx.fast.cuda_kernel(
        name=f"k2_chosen_product_{form.bits}_bits",
        input_names=names,
        output_names=["out"],
        source=shortened(text),
        header=defined + shortened(AS_FLOAT + _HEADER),
        ensure_row_contiguous=False,
    )
    return kernel, outputs, outputs // _tile(form.inputs, form.bits, form.gated)
