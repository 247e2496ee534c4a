"""Progress events and the result of a quantization."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class BytesDone:
    """Number of bytes of the new checkpoint written so far, and in total."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LayerQuantized:
    """Report of a module that is quantized and written."""

    path: str
    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """Facts about the new checkpoint, or with ``dry_run`` about the planned one.

    ``peak_memory_bytes`` counts arrays and read buffers, not Python itself; 0 in a dry run.
    ``bits`` is the config's default; a mixed ``recipe`` overrides it for each module.
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
