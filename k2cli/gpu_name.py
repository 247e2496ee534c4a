"""The name of one GPU of a machine, as plans, runs and messages give it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuName:
    """A GPU by its number in ``nvidia-smi``, its UUID and its model.

    ``uuid`` is the value for ``CUDA_VISIBLE_DEVICES``, which stays when cards are added or moved.
    It is empty for a GPU of the catalog, and for one that cannot be chosen by its UUID (a MIG
    slice, or a single GPU on a machine without nvidia-smi).
    """

    index: int
    uuid: str = ""
    name: str = ""

    @property
    def short(self) -> str:
        """The number alone: ``GPU 1``."""
        return f"GPU {self.index}"

    @property
    def label(self) -> str:
        """Number and model: ``GPU 1 (NVIDIA H200)``."""
        return f"{self.short} ({self.name})" if self.name else self.short
