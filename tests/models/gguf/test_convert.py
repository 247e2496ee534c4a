"""The GGUF importer compared with the format's own library, and with damaged files."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx_lm.utils import load_model

from k2cli.errors import K2Error
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.gguf.blocks import EXPANDED_TYPES, PACKED_BITS, expand, repack
from k2cli.models.gguf.convert import convert_gguf
from k2cli.models.gguf.reader import GgufFile
from k2cli.models.text.tokenizer import Tokenizer
from tests.models.gguf_files import (
    HEAD,
    KEY_VALUE_HEADS,
    LAYERS,
    original_weights,
    write_llama,
)


def _random_blocks(kind: str, rows: int = 6, blocks: int = 3) -> np.ndarray:
    """Make random codes and moderate scales of a type."""
    random = np.random.default_rng(7)
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    raw = random.integers(0, 256, (rows, blocks, size), np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for at in halves.get(kind, (0,)):
        scale = random.normal(size=(rows, blocks, 1)).astype("<f2") / 64
        raw[..., at : at + 2] = scale.astype("<f2").view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", list(PACKED_BITS))
def test_packed_types_are_exactly_the_weights_of_the_formats_library(kind: str) -> None:
    raw = _random_blocks(kind)
    weight, scales, biases = (mx.array(part) for part in repack(kind, raw))
    ours = mx.dequantize(
        weight,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=32,
        bits=PACKED_BITS[kind],
    )
    assert np.array_equal(np.array(ours), gguf.quants.dequantize(raw, Type[kind]))


@pytest.mark.parametrize("kind", EXPANDED_TYPES)
def test_other_types_are_the_librarys_weights_in_float16(kind: str) -> None:
    raw = _random_blocks(kind)
    expected = gguf.quants.dequantize(raw, Type[kind]).astype(np.float16)
    assert np.array_equal(expand(kind, raw), expected)


def _forward(folder: Path, tokens: list[int]) -> np.ndarray:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([tokens]))[0])


def _tensor(folder: Path, name: str) -> Any:
    return mx.load(str(folder / "model.safetensors"))[name]


def test_float_weights_come_back_in_the_originals_order(tmp_path: Path) -> None:
    weights = original_weights()
    folder = convert_gguf(write_llama(tmp_path / "m.gguf", weights), tmp_path / "converted")
    for part, name in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
        ours = np.array(_tensor(folder, f"model.layers.1.self_attn.{name}.weight"))
        assert np.array_equal(ours, weights[f"blk.1.{part}.weight"])
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["rope_theta"] == 500000.0
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert "quantization" not in checkpoint.config
    assert checkpoint.stored_bytes == sum(weight.nbytes for weight in weights.values())


def test_packed_model_computes_what_the_expanded_one_does(tmp_path: Path) -> None:
    """One model as Q4_1, and as the float32 values of that Q4_1: the same logits."""
    weights = original_weights(3)
    weights["output.weight"] = np.random.default_rng(4).normal(size=(12, 256)).astype(np.float32)
    packed = write_llama(tmp_path / "packed.gguf", weights, Type.Q4_1)
    rounded = {
        name: weight
        if weight.ndim == 1
        else gguf.quants.dequantize(gguf.quants.quantize(weight, Type.Q4_1), Type.Q4_1)
        for name, weight in weights.items()
    }
    plain = write_llama(tmp_path / "plain.gguf", rounded)
    first = convert_gguf(packed, tmp_path / "packed")
    second = convert_gguf(plain, tmp_path / "plain")
    config = json.loads((first / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert config["tie_word_embeddings"] is False
    difference = np.abs(_forward(first, [1, 5, 9, 2]) - _forward(second, [1, 5, 9, 2])).max()
    assert difference < 1e-4


def test_biases_of_attention_follow_their_rows(tmp_path: Path) -> None:
    weights = original_weights()
    random = np.random.default_rng(5)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            size = weights[f"blk.{layer}.{part}.weight"].shape[0]
            weights[f"blk.{layer}.{part}.bias"] = random.normal(size=size).astype(np.float32)
    folder = convert_gguf(write_llama(tmp_path / "m.gguf", weights), tmp_path / "out")
    ours = np.array(_tensor(folder, "model.layers.0.self_attn.k_proj.bias"))
    assert np.array_equal(ours, weights["blk.0.attn_k.bias"])
    assert read_checkpoint(folder).config["attention_bias"] is True
    assert np.isfinite(_forward(folder, [1, 2, 3])).all()


def test_llama3_rope_factors_become_its_scaling(tmp_path: Path) -> None:
    """Compare the frequencies of the file's table with those mlx-lm computes from the config."""
    factor, low, high, context, theta = 32.0, 1.0, 4.0, 8192, 500000.0
    frequencies = theta ** (-np.arange(0, HEAD, 2) / HEAD)
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    factors = (1 / ((1 - blend) / factor + blend)).astype(np.float32)
    weights = original_weights() | {"rope_freqs.weight": factors}
    folder = convert_gguf(write_llama(tmp_path / "m.gguf", weights), tmp_path / "out")
    model, _ = load_model(folder)
    periods = np.array(model.layers[0].self_attn.rope._freqs)
    np.testing.assert_allclose(periods, factors / frequencies, rtol=1e-4)

    odd = weights | {"rope_freqs.weight": factors[::-1].copy()}
    with pytest.raises(K2Error, match="not llama 3's"):
        convert_gguf(write_llama(tmp_path / "odd.gguf", odd), tmp_path / "odd")


def test_tokenizer_of_the_file(tmp_path: Path) -> None:
    folder = convert_gguf(write_llama(tmp_path / "m.gguf", original_weights()), tmp_path / "out")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("abcd<|end|>hg") == [8, 9, 10, 7, 6]
    assert tokenizer.stop_tokens == {10}
    # A control token is skipped; a token of type user-defined is text.
    assert tokenizer.decode([8, 10, 11]) == "ab<|tool|>"
    with pytest.raises(K2Error, match="no chat template"):
        tokenizer.chat_prompt([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"tokenizer_model": "llama"}, "'llama' tokenizer"),
        ({"pre": "deepseek-llm"}, "rule 'deepseek-llm'"),
        ({"change": lambda w: w.add_expert_count(8)}, "mixture of experts"),
        ({"change": lambda w: w.add_key_length(32)}, "head size"),
        ({"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "'yarn'"),
    ],
)
def test_what_cannot_be_imported_is_named(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    path = write_llama(tmp_path / "m.gguf", original_weights(), **options)
    with pytest.raises(K2Error, match=reason):
        convert_gguf(path, tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["m.gguf"]


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    weights = original_weights()
    del weights["blk.1.ffn_up.weight"]
    with pytest.raises(K2Error, match=r"lacks 1 tensors, the first is 'blk\.1\.ffn_up\.weight'"):
        convert_gguf(write_llama(tmp_path / "a.gguf", weights), tmp_path / "out")
    weights = original_weights() | {"blk.0.mystery.weight": np.ones(4, np.float32)}
    with pytest.raises(K2Error, match="mystery"):
        convert_gguf(write_llama(tmp_path / "b.gguf", weights), tmp_path / "out")
    weights = original_weights()
    weights["blk.0.attn_k.weight"] = weights["blk.0.attn_k.weight"][: KEY_VALUE_HEADS * 32]
    with pytest.raises(K2Error, match="its metadata says"):
        convert_gguf(write_llama(tmp_path / "c.gguf", weights), tmp_path / "out")


def test_damaged_headers_raise_k2_errors_only(tmp_path: Path) -> None:
    """Cut the file at many places and change bytes: it is read, or an error says why not."""
    whole = write_llama(tmp_path / "m.gguf", original_weights(), Type.Q8_0).read_bytes()
    with GgufFile(tmp_path / "m.gguf") as file:
        header = min(tensor.offset for tensor in file.tensors.values())
    damaged = tmp_path / "damaged.gguf"
    random_bytes = random.Random(11)
    for cut in [0, 3, 4, 8, 23, 24, *range(30, header, 37), header, len(whole) - 1]:
        damaged.write_bytes(whole[:cut])
        with pytest.raises(K2Error, match=r"cut short|empty|not a GGUF|has the shape"):
            convert_gguf(damaged, tmp_path / "out")
    messages: list[str] = []
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(random_bytes.choice([1, 1, 4])):
            changed[random_bytes.randrange(header)] = random_bytes.randrange(256)
        damaged.write_bytes(changed)
        try:
            convert_gguf(damaged, tmp_path / "out")
        except K2Error as error:
            messages.append(error.message)
        else:
            shutil.rmtree(tmp_path / "out")
    assert messages
    assert all(str(damaged) in message for message in messages)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["damaged.gguf", "m.gguf"]


@pytest.mark.parametrize("count", [2**63, 2**40])
def test_a_count_beyond_reason_allocates_nothing(tmp_path: Path, count: int) -> None:
    path = tmp_path / "m.gguf"
    for at in (8, 16):
        data = bytearray(b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + bytes(100))
        data[at : at + 8] = count.to_bytes(8, "little")
        path.write_bytes(data)
        with pytest.raises(K2Error, match="damaged"):
            GgufFile(path)


def test_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", original_weights())

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(path, tmp_path / "out", progress=interrupt)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["m.gguf"]
    convert_gguf(path, tmp_path / "out")
    with pytest.raises(K2Error, match="already exists"):
        convert_gguf(path, tmp_path / "out")
