"""A checkpoint of the 4-bit Kimi K2 whose headers are exact and whose data are holes.

Names, shapes and element types are those of k2's own trace of the model; files are sparse, so that
578 GB take a few hundred kB of disk. Planners that read headers and sizes see what they would see
of the published files; their data are never read.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from k2cli.models.layout import INDEX_NAME
from k2cli.models.safetensors_writer import TensorSpec, into_shards, safetensors_header, shard_name

MODEL = "k2-instruct-4bit"


@dataclass(frozen=True, slots=True)
class SparseCheckpoint:
    """The written checkpoint, with the true figures for the planners' answers."""

    folder: str
    tensors: int
    shards: int
    weights_bytes: int
    parameters: int


def write_sparse_k2(folder: Path) -> SparseCheckpoint:
    """Write config, index and sparse shards of at most 5 GB into ``folder``, which is made."""
    from k2cli.planning.model import read_model, shapes_of

    model = read_model(MODEL)
    shapes = shapes_of(model.facts.model)
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()]
    folder.mkdir(parents=True)
    config = model.config
    if "quantization" in config:
        config = config | {"quantization_config": config["quantization"]}  # as mlx-lm writes it
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards = into_shards(specs)
    total = sum(spec.nbytes for spec in specs)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = shard_name(number, len(shards))
        _write_sparse(folder / name, shard)
        weight_map.update({spec.name: name for spec in shard})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return SparseCheckpoint(
        str(folder), len(specs), len(shards), total, model.facts.parameter_count
    )


def _write_sparse(path: Path, specs: list[TensorSpec]) -> None:
    header = safetensors_header(specs)
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(spec.nbytes for spec in specs))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(write_sparse_k2(Path(sys.argv[1])))))
