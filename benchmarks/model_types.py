"""The model types that the installed mlx-lm has a class for."""

from __future__ import annotations

from pathlib import Path

from k2cli.mlx_lm_package import mlx_lm_folder
from k2cli.sharding.architectures import _literals as literals_of_mlx_lm

_CLASSES = ("Model", "ModelArgs")
"""Classes that every file of an architecture defines, and that loading imports."""


def supported_model_types() -> list[str]:
    """Return all model types for which mlx-lm has a class, sorted, without importing them."""
    folder = mlx_lm_folder() / "models"
    defining = {path.stem for path in folder.glob("*.py") if _defines_model(path)}
    renamed = {old for old, new in literals_of_mlx_lm("MODEL_REMAPPING").items() if new in defining}
    return sorted(defining | renamed)


def _defines_model(path: Path) -> bool:
    """True if a file of the folder defines a model; others are helpers."""
    source = path.read_text(encoding="utf-8")
    return all(f"class {name}" in source or f" {name}\n" in source for name in _CLASSES)
