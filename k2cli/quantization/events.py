"""What a conversion reports while it works, and its result: for progress bars, JSON and tests."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class BytesDone:
    """Bytes of the new checkpoint that are written, of all that will be."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LayerQuantized:
    """A module is quantized and written."""

    path: str
    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """The new checkpoint, or with ``dry_run`` what it would be.

    ``peak_memory_bytes`` counts arrays and read buffers, not Python itself; 0 in a dry run.
    ``bits`` is what the config says for all modules; a mixed ``recipe`` gives each its own.
    """

    path: str
    stored_bytes: int
    source_bytes: int
    bits: int
    group_size: int
    tensors: int
    peak_memory_bytes: int = 0
    quantized_modules: int = 0
    bits_per_weight: float = 0.0
    mode: str = "affine"
    recipe: str = ""
    dry_run: bool = False
    schema_version: int = SCHEMA_VERSION


QuantizationEvent = BytesDone | LayerQuantized | QuantizationResult
