"""Headers of checkpoints: files that the format's library writes, and wrong files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from k2cli.errors import K2Error
from k2cli.models.checkpoint import read_checkpoint, read_config

CONFIG = {"model_type": "llama", "num_hidden_layers": 2}


def _write_config(folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def _write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_offsets_lead_to_the_data_that_mlx_wrote(tmp_path: Path) -> None:
    arrays = {
        "a": mx.arange(12, dtype=mx.float32).reshape(3, 4),
        "b": mx.array([1, 2, 3], dtype=mx.uint32),
        "c": mx.ones((2, 2), dtype=mx.bfloat16),
        "scalar": mx.array(7.0),
    }
    _write_config(tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    checkpoint = read_checkpoint(tmp_path)
    assert {name: t.dtype for name, t in checkpoint.tensors.items()} == {
        "a": "F32", "b": "U32", "c": "BF16", "scalar": "F32",
    }  # fmt: skip
    tensor = checkpoint.tensors["a"]
    raw = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert np.array_equal(np.frombuffer(raw, "<f4").reshape(tensor.shape), np.array(arrays["a"]))
    assert checkpoint.tensors["scalar"].shape == ()
    assert checkpoint.stored_bytes == sum(array.nbytes for array in arrays.values())


def test_config_alone_is_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    _write_config(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.tensors, checkpoint.stored_bytes) == ({}, 0)


def test_several_files_with_and_without_index(tmp_path: Path) -> None:
    _write_config(tmp_path)
    for number, name in ((1, "x"), (2, "y")):
        path = tmp_path / f"model-{number}.safetensors"
        mx.save_safetensors(str(path), {name: mx.zeros((number,))})
    mx.save_safetensors(str(tmp_path / "adapter.safetensors"), {"z": mx.zeros((9,))})
    assert set(read_checkpoint(tmp_path).tensors) == {"x", "y"}

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    assert set(read_checkpoint(tmp_path).tensors) == {"x"}
    for weight_map, reason in (
        ({"x": "model-1.safetensors", "z": "model-3.safetensors"}, "names model-3.safetensors"),
        ({"x": "../model-1.safetensors"}, "not the name of a safetensors file"),
        ({"x": 3}, "weight_map must map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(K2Error, match=reason):
            read_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    _write_config(tmp_path)
    for number in (1, 2):
        mx.save_safetensors(str(tmp_path / f"model-{number}.safetensors"), {"x": mx.zeros((2,))})
    with pytest.raises(K2Error, match="is in both"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": _entry("F32", [2], 0, 8)}, bytes(7), "cut short"),
        ({"a": _entry("F32", [2], 0, 8)}, bytes(9), "1 bytes after its last tensor"),
        ({"a": _entry("F32", [2], 0, 4)}, bytes(4), "offsets span 4 bytes"),
        ({"a": _entry("F32", [-2], 0, 8)}, bytes(8), "shape"),
        ({"a": _entry("F32", [2**60, 2**60], 0, 8)}, bytes(8), "shape"),
        ({"a": _entry("F32", [1] * 17, 0, 4)}, bytes(4), "shape"),
        ({"a": _entry("F32", [True], 0, 4)}, bytes(4), "shape"),
        ({"a": _entry("F99", [2], 0, 8)}, bytes(8), "unknown dtype 'F99'"),
        ({"a": _entry("F32", [2], 8, 0)}, bytes(8), "data_offsets"),
        ({"a": _entry("F32", [1], 0, 4), "b": _entry("F32", [1], 2, 6)}, bytes(6), "overlaps"),
        ({"a": _entry("F32", [1], 0, 4), "b": _entry("F32", [1], 8, 12)}, bytes(12), "gap"),
        ({"a": [1, 2]}, b"", "not described by an object"),
        ({"a": {"dtype": "F32"}}, b"", "shape None"),
        ([1], b"", "not a JSON object"),
        (b'{"a": ', b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
            "occurs twice",
        ),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, header: Any, data: bytes, reason: str) -> None:
    _write_config(tmp_path)
    _write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(K2Error, match=reason) as caught:
        read_checkpoint(tmp_path)
    assert "model.safetensors" in caught.value.message


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (b"", "cut short"),
        (b"1234567", "cut short"),
        (struct.pack("<Q", 2**63), "no safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "cut short"),
    ],
)
def test_lying_lengths_are_refused(tmp_path: Path, prefix: bytes, reason: str) -> None:
    _write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(prefix)
    with pytest.raises(K2Error, match=reason):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "must hold a JSON object"),
        ("{", "not JSON"),
        ("{}", "model_type must be a string"),
        ('{"model_type": 3}', "model_type must be a string"),
        ('{"model_type": "x", "hidden_size": "wide"}', "hidden_size must be a positive integer"),
        ('{"model_type": "x", "num_hidden_layers": -1}', "num_hidden_layers"),
        ('{"model_type": "x", "vocab_size": true}', "vocab_size"),
        ('{"model_type": "x", "text_config": []}', "text_config must be an object"),
        ('{"model_type": "x", "text_config": {"hidden_size": 0}}', "hidden_size"),
        ('{"model_type": "x", "quantization": 4}', "quantization must be an object"),
        ('{"model_type": "x", "eos_token_id": "end"}', "eos_token_id must be an integer"),
    ],
)
def test_configs_that_are_none_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(K2Error, match=reason):
        read_config(tmp_path)


def test_generation_config_decides_the_end(tmp_path: Path) -> None:
    _write_config(tmp_path, eos_token_id=1)
    assert read_config(tmp_path)["eos_token_id"] == 1
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_config(tmp_path)["eos_token_id"] == [5, 6]
    with pytest.raises(K2Error, match="cannot read"):
        read_config(tmp_path / "absent")
