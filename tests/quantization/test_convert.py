"""k2's conversion compared with mlx-lm's own, byte for byte, and its refusals and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from k2cli.errors import K2Error, UsageError
from k2cli.models.checkpoint import read_checkpoint
from k2cli.quantization import convert
from k2cli.quantization.convert import quantize
from k2cli.quantization.events import BytesDone, LayerQuantized, QuantizationResult
from k2cli.sharding.recipe import Recipe, parse_recipe
from lab.toy_k2.checkpoint import ToyShape, build_toy_k2
from tests.quantization import originals

MLX_LM_SECONDS = 240


def convert_with_mlx_lm(source: Path, destination: Path, recipe: Recipe) -> Path:
    """Run the reference, mlx-lm's own conversion, in a process of its own."""
    script = (
        "import sys, mlx_lm.utils as u\n"
        "from mlx_lm.convert import convert\n"
        # The tokenizer is not under test, and loading it needs files that a toy lacks.
        "u._load_tokenizer = lambda *a, **k: None\n"
        "class T:\n"
        "    def save_pretrained(self, path): pass\n"
        "u.load_tokenizer = lambda *a, **k: T()\n"
        "u.create_model_card = lambda *a, **k: None\n"
        "convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=int(sys.argv[3]),\n"
        "        q_group_size=int(sys.argv[4]), q_mode=sys.argv[5],\n"
        "        quant_predicate=sys.argv[6] or None)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(source), str(destination)]
    done = subprocess.run(
        [*command, str(recipe.bits), str(recipe.group_size), recipe.mode, recipe.mixed],
        capture_output=True, text=True, timeout=MLX_LM_SECONDS, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return destination


def convert_with_k2(source: Path, destination: Path, recipe: Recipe, **options: Any) -> list[Any]:
    return list(quantize(source, destination, recipe, **options))


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = {}
    for tensor in read_checkpoint(folder).tensors.values():
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            tensors[tensor.name] = (tensor.dtype, tensor.shape, stream.read(tensor.nbytes))
    return tensors


def source_named(name: str, folder: Path) -> Path:
    match name:
        case "llama-bf16":
            return originals.llama(folder)
        case "llama-f16-tied":
            return originals.llama(folder, mx.float16, tie_word_embeddings=True)
        case "toy-float32":
            return build_toy_k2(folder, ToyShape(bits=None))
        case "kimi-bf16":
            return originals.kimi(folder)
        case "kimi-fp8":
            return originals.kimi(folder, fp8=True)
    raise AssertionError(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama-bf16", "mxfp8"),
        ("llama-bf16", "nvfp4"),
        ("llama-f16-tied", "3bit-g128"),
        ("toy-float32", "4bit-g32"),
        ("kimi-bf16", "6bit"),
        ("kimi-fp8", "4bit"),
        ("kimi-fp8", "mxfp4"),
        ("llama-f16-tied", "mixed_2_6-g32"),
        ("kimi-fp8", "mixed_3_6"),
    ],
)
def test_equals_mlx_lm_byte_for_byte(tmp_path: Path, name: str, recipe: str) -> None:
    source = source_named(name, tmp_path / "source")
    expected = convert_with_mlx_lm(source, tmp_path / "expected", parse_recipe(recipe))
    # Pieces that end in the middle of a tensor.
    events = convert_with_k2(source, tmp_path / "made", parse_recipe(recipe), piece_bytes=10_000)
    made, reference = tensor_bytes(tmp_path / "made"), tensor_bytes(expected)
    assert made.keys() == reference.keys()
    assert [name for name in made if made[name] != reference[name]] == []
    for file in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "made" / file).read_text() == (expected / file).read_text()
    result = events[-1]
    assert isinstance(result, QuantizationResult)
    assert result.tensors == len(reference)
    assert result.stored_bytes == read_checkpoint(expected).stored_bytes


def test_arrays_that_mlx_cannot_see_as_bytes_are_written_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = originals.kimi(tmp_path / "original")
    recipe = parse_recipe("4bit")
    convert_with_k2(source, tmp_path / "whole", recipe)
    view, seen = mx.array.view, []

    def small_view(array: mx.array, dtype: mx.Dtype) -> mx.array:
        seen.append(array.nbytes)
        return view(array, dtype)

    monkeypatch.setattr(mx.array, "view", small_view)
    monkeypatch.setattr(convert, "MOST_VIEWED_BYTES", 30_000)
    convert_with_k2(source, tmp_path / "parts", recipe, piece_bytes=20_000)
    assert max(seen) <= 30_000
    assert tensor_bytes(tmp_path / "parts") == tensor_bytes(tmp_path / "whole")


def test_router_and_norms_stay_and_events_add_up(tmp_path: Path) -> None:
    source = originals.kimi(tmp_path / "source")
    events = convert_with_k2(source, tmp_path / "made", Recipe(4, 64))
    quantized = {event.path for event in events if isinstance(event, LayerQuantized)}
    tensors = read_checkpoint(tmp_path / "made").tensors
    assert quantized == {name.removesuffix(".scales") for name in tensors if ".scales" in name}
    assert "model.layers.1.mlp.switch_mlp.up_proj" in quantized
    assert "model.layers.0.self_attn.embed_q" in quantized
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == "BF16"
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    progress = [event for event in events if isinstance(event, BytesDone)]
    result = events[-1]
    assert progress[0].done_bytes == 0
    assert progress[-1] == BytesDone(result.stored_bytes, result.stored_bytes)
    assert result.source_bytes == read_checkpoint(source).stored_bytes


def test_copies_the_tokenizer_and_no_code(tmp_path: Path) -> None:
    source = originals.llama(tmp_path / "source")
    convert_with_k2(source, tmp_path / "made", Recipe())
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_dry_run_tells_the_exact_size_and_writes_nothing(tmp_path: Path) -> None:
    source = originals.llama(tmp_path / "source")
    (planned,) = convert_with_k2(source, tmp_path / "made", Recipe(8, 32), dry_run=True)
    assert not (tmp_path / "made").exists()
    convert_with_k2(source, tmp_path / "made", Recipe(8, 32))
    assert planned.stored_bytes == read_checkpoint(tmp_path / "made").stored_bytes
    assert planned.dry_run


def test_memory_is_bounded_by_a_piece_not_by_the_checkpoint(tmp_path: Path) -> None:
    source = originals.llama(
        tmp_path / "source", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4
    )
    size = read_checkpoint(source).stored_bytes
    result = convert_with_k2(source, tmp_path / "made", Recipe(), piece_bytes=1 << 20)[-1]
    assert size > 100_000_000
    assert result.peak_memory_bytes < 20_000_000


def test_refuses_what_is_quantized_already(tmp_path: Path, toy_k2: Path) -> None:
    with pytest.raises(K2Error, match="already quantized: 4 bits, group size 32"):
        convert_with_k2(toy_k2, tmp_path / "made", Recipe())
    packed = originals.llama(
        tmp_path / "source",
        quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"},
    )
    with pytest.raises(K2Error, match="already quantized, by compressed-tensors"):
        convert_with_k2(packed, tmp_path / "made", Recipe())
    assert not (tmp_path / "made").exists()


def test_refuses_a_destination_in_use(tmp_path: Path) -> None:
    source = originals.llama(tmp_path / "source")
    kept = tmp_path / "made" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(K2Error, match="already exists"):
        convert_with_k2(source, tmp_path / "made", Recipe())
    with pytest.raises(K2Error, match="already exists"):
        convert_with_k2(source, source, Recipe())
    assert kept.read_text() == "mine"


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    source = originals.llama(tmp_path / "source")
    events = quantize(source, tmp_path / "made", Recipe(), piece_bytes=10_000)
    for _ in range(5):
        next(events)
    assert len(list(tmp_path.iterdir())) == 2  # the source and a hidden folder
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source = originals.llama(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(K2Error, match=r"has 1.0 MB free, the new checkpoint takes"):
        convert_with_k2(source, tmp_path / "made", Recipe())


def test_tensors_that_are_not_the_models_are_named(tmp_path: Path) -> None:
    source = originals.llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(K2Error, match=r"lacks tensors: model\.layers\.2"):
        convert_with_k2(source, tmp_path / "made", Recipe())


@pytest.mark.parametrize("wrong", [{"bits": 7}, {"group_size": 48}, {"mode": "mxfp4"}])
def test_a_recipe_without_kernels_is_a_usage_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        Recipe(**wrong)
