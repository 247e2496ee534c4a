"""Plan of a checkpoint's quantization, from lazily opened tensors.

The model is assembled by the same code that loads it for running, so originals with Hugging Face
names go through their architecture's own renaming, stacking and fp8 dequantization. The choice of
modules follows mlx-lm: those that can be quantized, whose rows divide into groups, and that the
model's ``quant_predicate`` does not exclude. Routers are not quantized.

A tensor that the model uses as it is stored is read from its file in pieces. One that is made of
others (stacked experts, split MLA projections) is computed as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from k2cli.errors import K2Error
from k2cli.models.checkpoint import Checkpoint, config_for_mlx_lm
from k2cli.models.safetensors_header import StoredTensor
from k2cli.models.safetensors_writer import TensorSpec
from k2cli.sharding.assemble import assemble
from k2cli.sharding.model_errors import naming_folder
from k2cli.sharding.recipe import (
    Recipe,
    cast_to_conversion_type,
    obstacle_to_quantizing,
    quantize_lazily,
)
from k2cli.sharding.stored_weights import FileReads, gpu_waits_for_reads, with_stored_head

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT_NAMES: Mapping[Any, str] = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16",
    mx.int64: "I64", mx.int32: "I32", mx.int16: "I16", mx.int8: "I8",
    mx.uint64: "U64", mx.uint32: "U32", mx.uint16: "U16", mx.uint8: "U8", mx.bool_: "BOOL",
}  # fmt: skip
STREAMED_TYPES: Mapping[str, mx.Dtype] = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
}  # fmt: skip
"""Element types of tensors that are read in pieces."""


@dataclass(slots=True)
class Step:
    """Conversion of one module or parameter.

    ``quantization`` holds group size, bits and mode, or is None for a parameter that is only
    copied. ``stored`` is the tensor to read in pieces; if it is None, ``arrays`` are the lazy
    outputs, computed as a whole. Floats are cast to ``dtype`` before they are quantized.
    """

    path: str
    outputs: list[TensorSpec]
    dtype: mx.Dtype
    quantization: dict[str, Any] | None = None
    stored: StoredTensor | None = None
    arrays: list[mx.array] = field(default_factory=list)


@dataclass(slots=True)
class Conversion:
    """Planned conversion: steps in the order of the new files, and the new config.

    ``reads`` are those for the arrays of steps, where a GPU must not wait for them.
    """

    steps: list[Step]
    config: dict[str, Any]
    source_bytes: int
    total_parameters: int
    reads: FileReads | None = None

    @property
    def tensors(self) -> list[TensorSpec]:
        """All tensors of the new checkpoint, in order."""
        return [tensor for step in self.steps for tensor in step.outputs]

    @property
    def stored_bytes(self) -> int:
        """Size of the new checkpoint's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_conversion(checkpoint: Checkpoint, recipe: Recipe) -> Conversion:
    """Plan a checkpoint's quantization from its headers, without reading data.

    Raises:
        UsageError: if no model can be built from the config.
        K2Error: if the checkpoint is already quantized, or its tensors do not fit the model.
    """
    refuse_quantized(checkpoint)
    opened = _open(checkpoint)
    stored_of = {id(array): name for name, array in opened.items()}
    with naming_folder(checkpoint.folder):
        model = assemble(checkpoint.config, opened)
    origins = {
        path: checkpoint.tensors[stored_of[id(value)]]
        for path, value in tree_flatten(model.parameters())
        if id(value) in stored_of
    }
    cast_to_conversion_type(checkpoint.config, model)
    before = {path: value.dtype for path, value in tree_flatten(model.parameters())}
    applied, overrides = quantize_lazily(model, recipe)
    steps = _steps(model, applied, before, origins)
    written = with_stored_head(config_for_mlx_lm(checkpoint.folder), opened)
    config = _new_config(written, recipe, overrides, model)
    computed = any(step.arrays for step in steps)
    reads = FileReads(opened.values()) if computed and gpu_waits_for_reads() else None
    return Conversion(steps, config, checkpoint.stored_bytes, _count_parameters(model), reads)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is already quantized: its quality would suffer for no gain.

    Raises:
        K2Error: unless the weights are floats, or fp8 that is dequantized on loading.
    """
    obstacle = obstacle_to_quantizing(checkpoint.config)
    if obstacle is not None:
        raise K2Error(
            f"{checkpoint.folder} is {obstacle}", "quantize the original, unquantized checkpoint"
        )


def _open(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Open all tensors lazily, by name; only headers are read."""
    files: set[Path] = {tensor.file for tensor in checkpoint.tensors.values()}
    opened: dict[str, mx.array] = {}
    for file in sorted(files):
        try:
            tensors: Any = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise K2Error(f"MLX cannot read {file}: {error}") from error
        opened.update(tensors)
    return {name: opened[name] for name in checkpoint.tensors}


def _steps(
    model: nn.Module,
    applied: Mapping[str, dict[str, Any]],
    before: Mapping[str, mx.Dtype],
    origins: Mapping[str, StoredTensor],
) -> list[Step]:
    """Group parameters into steps, in the order in which mlx-lm writes them."""
    steps: list[Step] = []
    by_module: dict[str, Step] = {}
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        output = _output(name, array)
        is_packed = path in applied and leaf in ("weight", "scales", "biases")
        if is_packed and path in by_module:
            by_module[path].outputs.append(output)
            by_module[path].arrays.append(array)
            continue
        origin = f"{path}.weight" if is_packed else name
        step = Step(path if is_packed else name, [output], before[origin])
        step.stored = _streamable(origins.get(origin))
        step.arrays.append(array)
        if is_packed:
            step.quantization = applied[path]
            by_module[path] = step
        steps.append(step)
    for step in steps:
        if step.stored is not None:
            step.arrays.clear()
    return steps


def _streamable(tensor: StoredTensor | None) -> StoredTensor | None:
    usable = tensor is not None and tensor.dtype in STREAMED_TYPES and len(tensor.shape) > 0
    return tensor if usable else None


def _output(name: str, array: mx.array) -> TensorSpec:
    return TensorSpec(name, _FORMAT_NAMES[array.dtype], tuple(array.shape))


def _new_config(
    config: Mapping[str, Any],
    recipe: Recipe,
    overrides: Mapping[str, dict[str, Any]],
    model: nn.Module,
) -> dict[str, Any]:
    """Make the config as mlx-lm writes it: sorted, with the quantization under both names."""
    quantization = {**recipe.settings, **overrides}
    dropped = {"_name_or_path", "vision_config"}
    if "vision_tower" in getattr(model, "model", {}):
        dropped.discard("vision_config")
    kept = {name: value for name, value in config.items() if name not in dropped}
    return dict(
        sorted({**kept, "quantization": quantization, "quantization_config": quantization}.items())
    )


def _count_parameters(model: nn.Module) -> int:
    """Count parameters as mlx-lm does for its index: packed weights count unpacked."""
    total = 0
    leaves = tree_flatten(model.leaf_modules(), is_leaf=lambda node: isinstance(node, nn.Module))
    for _, module in leaves:
        if hasattr(module, "bits"):
            bias = module.bias.size if "bias" in module else 0
            total += bias + module.weight.size * 32 // module.bits
        else:
            total += sum(value.size for _, value in tree_flatten(module.parameters()))
    return int(total)
