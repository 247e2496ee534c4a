"""Readiness of this machine for NCCL, NVIDIA's communication between GPUs."""

from __future__ import annotations

import msgspec


class Nccl(msgspec.Struct, frozen=True):
    """NVIDIA GPUs that MLX sees here; ``obstacle`` is the reason that they cannot use NCCL."""

    gpus: int
    obstacle: str | None = None


def nccl() -> Nccl:
    """Ask MLX for its GPUs and its NCCL."""
    try:
        import mlx.core as mx

        if not mx.cuda.is_available():
            where = "Metal" if mx.metal.is_available() else "the CPU"
            return Nccl(0, f"NCCL joins NVIDIA GPUs, and MLX computes with {where} here")
        gpus = mx.device_count(mx.gpu)
        if gpus == 0:  # MLX is built for CUDA
            return Nccl(0, "MLX finds no NVIDIA GPU here")
        if not mx.distributed.is_available("nccl"):
            return Nccl(gpus, "this build of MLX has no NCCL")
    except (ImportError, OSError, RuntimeError) as error:
        return Nccl(0, f"MLX does not load: {error}")
    return Nccl(gpus)
