"""What to quantize to. So far one recipe: the same bits for every module that can be quantized."""

from __future__ import annotations

from dataclasses import dataclass

from k2cli.errors import UsageError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MODES = ("affine",)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Uniform affine quantization: each group of weights in a row shares a scale and a bias.

    Raises:
        UsageError: for bits, a group size or a mode that MLX has no kernels for.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        checks = (("bits", self.bits, BITS), ("group-size", self.group_size, GROUP_SIZES),
                  ("mode", self.mode, MODES))  # fmt: skip
        for name, value, allowed in checks:
            if value not in allowed:
                options = ", ".join(map(str, allowed))
                raise UsageError(f"--{name} {value} is not possible", f"one of {options}")
