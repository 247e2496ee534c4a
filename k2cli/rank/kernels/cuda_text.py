"""Text of k2's own CUDA kernels: what they share, and how it is shortened."""

from __future__ import annotations

AS_FLOAT = """
namespace k2 {
__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
}  // namespace k2
"""
"""``k2::as_float`` of each type that MLX has for weights on a GPU."""


def shortened(text: str) -> str:
    """Return CUDA text without comments and indentation: MLX hashes all of it in every call."""
    lines = (line.split("//")[0].strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line)
