"""Checkpoints of random bytes for tests, and the toy of Kimi K2 in many files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.layout import INDEX_NAME
from k2cli.models.safetensors_writer import ShardWriter, TensorSpec, safetensors_header
from k2cli.sharding.assemble import assemble
from k2cli.sharding.trace import parameters


def random_model(folder: Path, files: int, nbytes: int, seed: int = 7) -> Path:
    """Make a folder that has the form of a checkpoint, with files of random bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    source = random.Random(seed)
    for number in range(1, files + 1):
        header = safetensors_header([TensorSpec(f"model.layers.{number}.w", "U8", (nbytes,))])
        path = folder / f"model-{number:05d}-of-{files:05d}.safetensors"
        path.write_bytes(header + source.randbytes(nbytes))
    return folder


def random_mlx_model(folder: Path, config: dict[str, Any]) -> Path:
    """Write a checkpoint like an MLX conversion's, with random bytes, nearly all distinct."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(7)
    weights = {
        name: mx.random.randint(0, 2**31, value.shape, mx.uint32)
        if value.dtype == mx.uint32
        else mx.random.normal(value.shape).astype(value.dtype)
        for name, value in parameters(assemble(config, None)).items()
    }
    names = sorted(weights)
    for index, half in enumerate((names[::2], names[1::2])):
        file = folder / f"model-{index + 1:05}-of-00002.safetensors"
        mx.save_safetensors(str(file), {name: weights[name] for name in half})
    return folder


def in_many_files(source: Path, folder: Path, shard_bytes: int = 400_000) -> Path:
    """Write a checkpoint again, in files of at most so many bytes."""
    folder.mkdir(parents=True)
    checkpoint = read_checkpoint(source)
    tensors = list(checkpoint.tensors.values())
    specs = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    with ShardWriter(folder, specs, shard_bytes) as writer:
        for tensor in tensors:
            with tensor.file.open("rb") as file:
                file.seek(tensor.offset)
                writer.write(tensor.name, 0, file.read(tensor.nbytes))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": writer.file_names}))
    for path in source.iterdir():
        if not path.name.endswith((".safetensors", INDEX_NAME)):
            shutil.copy(path, folder)
    return folder
