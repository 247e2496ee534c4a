"""Text of k2's own CUDA kernels."""

from __future__ import annotations


def shortened(text: str) -> str:
    """Return CUDA text without comments and indentation: MLX hashes all of it in every call."""
    lines = (line.split("//")[0].strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line)
