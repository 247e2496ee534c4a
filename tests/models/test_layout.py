"""Folders as other tools and systems leave them: which files are read, and what a refusal says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.utils
import pytest

from k2cli.errors import K2Error
from k2cli.models.checkpoint import read_checkpoint, read_config
from k2cli.models.inspection import inspect_model
from k2cli.models.json_files import read_json_object
from k2cli.models.layout import (
    choose_weight_files,
    no_safetensors_error,
    split_parts,
    supporting_files,
)
from k2cli.models.reference import local_checkpoint
from k2cli.sharding.assemble import assemble, build
from k2cli.sharding.trace import parameters

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4983508568\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one file without an index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = dict(mlx.utils.tree_flatten(build(CONFIG).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def is_complete(folder: Path) -> bool:
    """True if the tensors that are read are those of the model, which assembly checks."""
    checkpoint = read_checkpoint(folder)
    arrays = {name: mx.zeros(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    return bool(parameters(assemble(checkpoint.config, arrays)))


def test_an_index_of_other_files_is_ignored_with_a_warning(model: Path) -> None:
    """stale_index/ of the public reports (mlx-vlm#624, mlx-swift-lm#554, mlx-serve#465)."""
    write_index(model, {"model.norm.weight": "model-00001-of-00002.safetensors"})
    checkpoint = read_checkpoint(model)
    [warning] = checkpoint.warnings
    assert "is stale: it names model-00001-of-00002.safetensors, which is not there" in warning
    assert warning.endswith("read instead: model.safetensors")
    assert is_complete(model)


def test_an_index_that_misplaces_tensors_is_ignored_with_a_warning(model: Path) -> None:
    write_index(model, {"model.mtp.weight": "model.safetensors"})
    [warning] = read_checkpoint(model).warnings
    assert "tensor 'model.mtp.weight' is not in model.safetensors" in warning
    assert is_complete(model)


def test_an_index_of_which_only_a_part_is_there_is_a_broken_download(model: Path) -> None:
    write_index(model, {"a": "model.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(K2Error, match=r"names model-2\.safetensors, which the folder does not"):
        read_checkpoint(model)


def test_a_missing_file_of_a_series_without_an_index_is_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    with pytest.raises(K2Error, match=r"but not model-00002-of-00002\.safetensors"):
        read_checkpoint(model)


@pytest.mark.parametrize(
    "beside",
    ["._model.safetensors", "consolidated.safetensors", "adapter_model.safetensors",
     "original/model.safetensors", "consolidated.00.pth"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_other_files_beside_the_weights_are_not_read(model: Path, beside: str, name: str) -> None:
    """AppleDouble files, Mistral's and Meta's own layouts, adapters (exo#1800, vllm#30537)."""
    (model / "model.safetensors").rename(model / name)
    (model / beside).parent.mkdir(exist_ok=True)
    (model / beside).write_bytes(b"\0\5\x16\7 not safetensors")
    assert is_complete(model)
    assert local_checkpoint(str(model)) == model


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["pytorch_model.bin"], r"only pickled weights: pytorch_model\.bin", "mlx-community"),
        (["consolidated.safetensors"], "only Mistral's own layout", "mlx-community"),
        (["x-Q4_K_M.gguf", "x-Q8_0.gguf"], r"GGUF files: x-Q4_K_M\.gguf, x-Q8_0\.gguf",
         "k2 plan-memory {folder}/x-Q4_K_M.gguf"),
        ([], "no .safetensors files", "give the folder of a checkpoint"),
    ],
)  # fmt: skip
def test_a_folder_without_safetensors_says_what_it_has(
    model: Path, names: list[str], message: str, hint: str
) -> None:
    (model / "model.safetensors").unlink()
    for name in names:
        (model / name).write_bytes(b"x")
    with pytest.raises(K2Error, match=message) as caught:
        local_checkpoint(str(model))
    assert hint.format(folder=model) in str(caught.value.hint)


def test_a_folder_of_gguf_files_alone_lists_them(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(K2Error, match=r"GGUF files: x\.gguf"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_file(
    model: Path, name: str
) -> None:
    """lfs_pointer/ of the public reports (DeepSeek-V3#557)."""
    (model / name).write_bytes(POINTER)
    with pytest.raises(K2Error, match=f"{name} is a Git LFS pointer") as caught:
        read_checkpoint(model)
    assert caught.value.hint == f"git -C {model} lfs pull"


def test_a_gguf_file_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(POINTER)
    with pytest.raises(K2Error, match=r"x\.gguf is a Git LFS pointer"):
        inspect_model(str(tmp_path / "x.gguf"))


def test_damage_in_the_hub_cache_names_the_command_that_fetches_again(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / "abc"
    shutil.copytree(model, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(K2Error, match="cut short") as caught:
        read_checkpoint(folder)
    assert caught.value.hint == "k2 download owner/name"


def with_tensors(folder: Path, **more: mx.array) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return arrays | {name.replace("__", "."): array for name, array in more.items()}


def test_a_tied_head_that_is_stored_all_the_same_is_left_out(model: Path) -> None:
    for model_type in ("llama", "qwen3", "olmo2"):
        config = {**CONFIG, "model_type": model_type, "head_dim": 16}
        stored = dict(mlx.utils.tree_flatten(build(config).parameters()))
        stored["lm_head.weight"] = mx.zeros((64, 32))
        assert "lm_head.weight" not in parameters(assemble(config, stored))


def test_stored_frequencies_of_rope_are_left_out(model: Path) -> None:
    config = {**CONFIG, "model_type": "olmo2"}
    stored = dict(mlx.utils.tree_flatten(build(config).parameters()))
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((8,))
    assert assemble(config, stored)


def test_a_stored_head_counts_if_the_config_does_not_say_that_it_is_tied(model: Path) -> None:
    """transformers takes an untied head for Llama, mlx-lm a tied one (Step-Audio-EditX#38)."""
    config = {name: each for name, each in CONFIG.items() if name != "tie_word_embeddings"}
    assert "lm_head.weight" in parameters(
        assemble(config, with_tensors(model, lm_head__weight=mx.zeros((64, 32))))
    )
    assert "lm_head.weight" not in parameters(assemble(config, with_tensors(model)))


def test_an_untied_head_is_no_copy(model: Path) -> None:
    config = {**CONFIG, "model_type": "gemma", "head_dim": 16, "tie_word_embeddings": False}
    stored = dict(mlx.utils.tree_flatten(build(config).parameters()))
    stored["lm_head.weight"] = mx.zeros((64, 32))
    with pytest.raises(K2Error, match=r"unknown tensors: lm_head\.weight"):
        assemble(config, stored)


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {}, "'gptq'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, {}, "'awq'"),
        (None, {"model.layers.0.mlp.up_proj.qweight": (4, 4),
                "model.layers.0.mlp.up_proj.g_idx": (4,)}, "quantized with GPTQ"),
        (None, {"model.layers.0.mlp.up_proj.qweight": (4, 4)}, "quantized with AWQ or GPTQ"),
    ],
)  # fmt: skip
def test_gptq_and_awq_are_refused_by_name(
    model: Path, settings: Any, tensors: dict[str, tuple[int, ...]], words: str
) -> None:
    config = {**CONFIG, **({"quantization_config": settings} if settings else {})}
    stored = with_tensors(model) | {name: mx.zeros(shape) for name, shape in tensors.items()}
    with pytest.raises(K2Error, match=words):
        assemble(config, stored)


def test_any_part_of_a_split_gguf_names_all_of_them() -> None:
    parts = [Path(f"/m/x-0000{number}-of-00003.gguf") for number in (1, 2, 3)]
    assert split_parts(parts[1]) == parts
    assert split_parts(Path("/m/x.gguf")) == [Path("/m/x.gguf")]


def test_the_files_of_a_download_are_those_that_loading_reads() -> None:
    names = ["README.md", "config.json", "tokenizer.json", "tokenizer.model.v3", "params.json",
             "original/tokenizer.model", "chat_template.jinja", "._tokenizer.json", "qwen.tiktoken",
             "additional_chat_templates/tool_use.jinja", "figures/a.json"]  # fmt: skip
    assert supporting_files(names) == [
        "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "config.json",
        "qwen.tiktoken", "tokenizer.json",
    ]  # fmt: skip
    weights = ["model-00001-of-00001.safetensors", "original/model.safetensors",
               "consolidated.safetensors"]  # fmt: skip
    assert choose_weight_files(weights, None, "x").names == ("model-00001-of-00001.safetensors",)


def test_null_and_zero_experts_of_granite_are_a_dense_model(model: Path) -> None:
    """granite_dense/ of the public reports (mlx-lm#442)."""
    from k2cli.planning.config_check import check_config

    (model / "config.json").write_text(
        json.dumps({**CONFIG, "num_local_experts": 0, "num_experts_per_tok": 0, "num_experts": 0})
    )
    config = read_config(model)
    check_config(config, "config.json", frozenset())
    assert config["num_local_experts"] is None


def test_a_json_file_is_read_as_before(model: Path) -> None:
    assert read_json_object(model / "config.json") == CONFIG


def test_the_command_for_a_gguf_file_has_a_plain_path() -> None:
    for where, path in ((".", "./a.gguf"), ("./.", "./a.gguf"), ("m/", "./m/a.gguf")):
        assert no_safetensors_error(["a.gguf"], where, None).hint == f"k2 plan-memory {path}"


def test_layers_that_predict_further_tokens_are_left_out() -> None:
    config = {**CONFIG, "num_nextn_predict_layers": 1}
    weights = dict(mlx.utils.tree_flatten(build(config).parameters()))
    further = f"model.layers.{config['num_hidden_layers']}.eh_proj.weight"
    assemble(config, {**weights, further: mx.zeros((4, 4))})
    with pytest.raises(K2Error, match=f"unknown tensors: {further}"):
        assemble(CONFIG, {**weights, further: mx.zeros((4, 4))})


@pytest.mark.parametrize(("dtype", "word"), [(mx.uint8, "uint8"), (mx.int32, "int32")])
def test_integers_in_the_place_of_floats_are_refused(dtype: mx.Dtype, word: str) -> None:
    """MLX reads fp8 as bytes; without this check it would compute with them."""
    weights = dict(mlx.utils.tree_flatten(build(CONFIG).parameters()))
    name = "model.norm.weight"
    weights[name] = mx.ones(weights[name].shape, dtype=dtype)
    with pytest.raises(K2Error, match=f"wrong tensors: {name} is {word}, expected float32"):
        assemble(CONFIG, weights)
