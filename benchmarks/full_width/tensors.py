"""The files of a K2 at full width with few layers: config, tokenizer, headers, and where data goes.

Every layer has K2's own sizes and its own file; only the number of layers is smaller. Weights are
4-bit in groups of 64, as in mlx-community's checkpoints of K2, everything else is bfloat16. The
tokenizer has words of one token each (``benchmarks.checkpoints``), and nothing ends an answer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import special_tokens, word_tokenizer
from k2cli.models.checkpoint import INDEX_NAME
from k2cli.models.safetensors_writer import TensorSpec, safetensors_header
from lab.toy_k2.checkpoint import Matrix, ToyShape, build_toy_k2, toy_config, toy_tensors

FULL_WIDTH = ToyShape(
    layers=10,
    hidden=7168,
    heads=64,
    experts=384,
    experts_per_token=8,
    q_lora=1536,
    kv_lora=512,
    rope=64,
    nope=128,
    value=128,
    dense_intermediate=18432,
    expert_intermediate=2048,
    bits=4,
    group_size=64,
    vocabulary=163_840,
)
SMALL = ToyShape(
    layers=4,
    hidden=256,
    heads=8,
    experts=16,
    experts_per_token=4,
    q_lora=64,
    kv_lora=64,
    rope=32,
    nope=64,
    value=64,
    dense_intermediate=512,
    expert_intermediate=128,
    bits=4,
    group_size=64,
    vocabulary=4096,
)
"""The same in small, to try the recipe without a large machine."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the arrays of one parameter are: absolute offsets in a file, one per array.

    A quantized matrix has weight, scales and biases; other parameters have one array.
    """

    file: str
    part: Matrix | TensorSpec
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a checkpoint, by name, and their sizes; where every parameter goes."""

    stored: tuple[Stored, ...]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    weight_map: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def layout_of(shape: ToyShape) -> Layout:
    """Place the parameters of a shape in files, one for each layer and one for both ends."""
    files: dict[str, list[Matrix | TensorSpec]] = {}
    for part in toy_tensors(shape):
        files.setdefault(_file_of(part.name), []).append(part)
    stored: list[Stored] = []
    headers, sizes, weight_map = {}, {}, {}
    for file, parts in files.items():
        header = safetensors_header([spec for part in parts for spec in _arrays(part, shape)])
        placed, end = _placed(parts, shape)
        headers[file] = header
        sizes[file] = len(header) + end
        stored += [
            Stored(file, part, tuple(len(header) + offset for offset in offsets))
            for part, offsets in placed
        ]
        for part in parts:
            weight_map |= {spec.name: file for spec in _arrays(part, shape)}
    return Layout(tuple(stored), headers, sizes, weight_map)


def _file_of(name: str) -> str:
    words = name.split(".")
    if words[:2] == ["model", "layers"]:
        return f"model-layer-{int(words[2]):02d}.safetensors"
    return "model-ends.safetensors"


def _arrays(part: Matrix | TensorSpec, shape: ToyShape) -> Iterator[TensorSpec]:
    """Yield the arrays of a parameter; what is not quantized is bfloat16, but the router's bias."""
    if isinstance(part, TensorSpec):
        yield TensorSpec(part.name, "F32" if part.name.endswith("bias") else "BF16", part.shape)
        return
    assert shape.bits is not None
    *lead, inputs = part.shape
    groups = (*lead, inputs // shape.group_size)
    yield TensorSpec(f"{part.name}.weight", "U32", (*lead, inputs * shape.bits // 32))
    yield TensorSpec(f"{part.name}.scales", "BF16", groups)
    yield TensorSpec(f"{part.name}.biases", "BF16", groups)


def _placed(
    parts: list[Matrix | TensorSpec], shape: ToyShape
) -> tuple[list[tuple[Matrix | TensorSpec, tuple[int, ...]]], int]:
    """Return the offset of each array of a file after its header, and the end of all."""
    placed = []
    end = 0
    for part in parts:
        sizes = [spec.nbytes for spec in _arrays(part, shape)]
        placed.append((part, tuple(end + sum(sizes[:index]) for index in range(len(sizes)))))
        end += sum(sizes)
    return placed, end


def write_headers(folder: Path, shape: ToyShape) -> Layout:
    """Write all files with their headers and sizes, but without data: enough to plan from.

    The data is a hole in each file, which takes no space until it is filled.
    """
    folder.mkdir(parents=True)
    layout = layout_of(shape)
    for file, header in layout.headers.items():
        with (folder / file).open("wb") as written:
            written.write(header)
            written.truncate(layout.sizes[file])
    _write_index(folder, layout.weight_map, layout.bytes)
    config = {**toy_config(shape), "torch_dtype": "bfloat16"}
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    return layout


def _write_index(folder: Path, weight_map: dict[str, str], size: int) -> None:
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def _write_tokenizer(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        toy = build_toy_k2(Path(temporary) / "toy", ToyShape(layers=2))
        (folder / "tokenizer.json").write_text(json.dumps(word_tokenizer(special_tokens(toy))))
        shutil.copy(toy / "chat_template.jinja", folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_view(folder: Path, whole: Path, layers: int, model_type: str) -> Path:
    """Make a folder of links to a checkpoint's files: fewer layers, or another ``model_type``.

    transformers, which reads the tokenizer for mlx-lm, does not know ``kimi_k2``.
    """
    folder.mkdir(parents=True)
    index = json.loads((whole / INDEX_NAME).read_text())
    last = _file_of(f"model.layers.{layers - 1}.x")
    kept = {
        name: file
        for name, file in index["weight_map"].items()
        if not file.startswith("model-layer-") or file <= last
    }
    files = set(kept.values())
    for file in files:
        (folder / file).symlink_to((whole / file).resolve())
    _write_index(folder, kept, sum((whole / file).stat().st_size for file in files))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(whole / name, folder)
    config = json.loads((whole / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
