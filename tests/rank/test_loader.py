"""Every rank's part, read by ranges, is byte for byte what mlx makes of the whole tensors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx.utils import tree_flatten

from k2cli.errors import K2Error
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.safetensors_header import StoredTensor
from k2cli.protocol import Assignment
from k2cli.rank.loader import LoadedPart, load_part, placement_of
from k2cli.rank.tensor_reader import TensorReader, layout_of
from k2cli.sharding.assemble import assemble
from k2cli.sharding.slices import AxisSlice
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import cut
from tests.support.memory import held_bytes
from tests.support.rank_pool import assignments
from tests.support.weights import random_mlx_model

COMMON = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}
PACKED = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
LLAMA = {"model_type": "llama", "attention_bias": True, **COMMON}
QWEN3 = {
    "model_type": "qwen3", "head_dim": 32, "rope_theta": 1e4, "tie_word_embeddings": False,
    **COMMON,
}  # fmt: skip
# A fused projection and a convolution, both cut in segments.
QWEN3_5 = {
    "model_type": "qwen3_5", "head_dim": 32, "full_attention_interval": 2,
    "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, **COMMON,
}  # fmt: skip
# A bias that is divided by the number of ranks, sinks that are cut by heads.
GPT_OSS = {
    "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2, **COMMON,
}  # fmt: skip
KIMI = {
    "model_type": "kimi_k2", "moe_intermediate_size": 128, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, **COMMON, "num_key_value_heads": 8,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, packed": LLAMA | PACKED,
    "qwen3": QWEN3 | {"torch_dtype": "float32"},
    "qwen3, packed": QWEN3 | PACKED,
    "qwen3_5": QWEN3_5,
    "qwen3_5, packed": QWEN3_5 | PACKED,
    "gpt_oss, packed": GPT_OSS | PACKED,
    "kimi_k2": KIMI,
    "kimi_k2, packed": KIMI | PACKED,
}
PLACEMENTS = [("single", 1), ("pipeline", 3), ("tensor", 2), ("tensor", 4)]


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each architecture, 4-bit or not."""
    return random_mlx_model(
        tmp_path_factory.mktemp("checkpoints") / "model", CONFIGS[request.param]
    )


def _bytes(array: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))


def _by_mlx(assignment: Assignment) -> dict[str, mx.array]:
    """Make the same part from whole tensors that mlx reads and the model cuts."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(Path(assignment.model_path).glob("*.safetensors")):
        opened = mx.load(str(file))
        assert isinstance(opened, dict)
        tensors |= opened
    config = read_checkpoint(Path(assignment.model_path)).config
    model = assemble(config, tensors, assignment.dtype)
    group = StandInGroup(assignment.rank, assignment.size)
    cut(config, model, placement_of(assignment), group)
    return dict(tree_flatten(model.parameters()))


def _load(assignment: Assignment) -> LoadedPart:
    steps: list[tuple[int, int]] = []
    group = StandInGroup(assignment.rank, assignment.size)
    part = load_part(assignment, group, lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps)
    assert steps[-1] == (part.weights_bytes, part.weights_bytes)
    return part


def _check(assignment: Assignment) -> LoadedPart:
    part = _load(assignment)
    expected = _by_mlx(assignment)
    loaded = dict(tree_flatten(part.stage.model.parameters()))
    assert list(loaded) == list(expected)
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype, name
        assert loaded[name].shape == value.shape, name
        assert _bytes(loaded[name]) == _bytes(value), name
    assert {tensor.name for tensor in part.held} == set(expected)
    return part


@pytest.mark.parametrize(("strategy", "size"), PLACEMENTS)
def test_parts_are_those_that_mlx_makes(checkpoint: Path, strategy: str, size: int) -> None:
    for assignment in assignments(checkpoint, strategy, size, dtype="checkpoint"):
        part = _check(assignment)
        assert part.bytes_read == part.weights_bytes + part.bytes_over_read
        if strategy != "tensor":
            assert part.bytes_over_read == 0


@pytest.mark.parametrize(("strategy", "size"), PLACEMENTS)
def test_parts_are_cast_as_mlx_casts(checkpoint: Path, strategy: str, size: int) -> None:
    _check(assignments(checkpoint, strategy, size, dtype="float32")[-1])


def test_a_slice_never_has_its_whole_in_memory(toy_k2: Path) -> None:
    for assignment in assignments(toy_k2, "tensor", 2, dtype="checkpoint"):
        before = held_bytes()
        part = _load(assignment)
        assert mx.get_peak_memory() - before < part.weights_bytes + 65_536
        largest = max(tensor.nbytes for tensor in part.held)
        del part
        before = held_bytes()
        cast = _load(msgspec.structs.replace(assignment, dtype="float32"))
        assert mx.get_peak_memory() - before < cast.weights_bytes + largest + 65_536


def test_slices_of_leading_axes_are_read_alone(tmp_path: Path) -> None:
    """Check that each of two ranks reads only its own bytes if rows are long enough."""
    config = QWEN3 | {
        "num_hidden_layers": 2, "head_dim": 4096, "intermediate_size": 32768, "hidden_size": 32,
    }  # fmt: skip
    for assignment in assignments(
        random_mlx_model(tmp_path / "model", config), "tensor", 2, dtype="checkpoint"
    ):
        part = _check(assignment)
        assert part.bytes_over_read == 0


def _stored(folder: Path, data: bytes, shape: tuple[int, ...]) -> StoredTensor:
    file = folder / "data.bin"
    file.write_bytes(b"header" + data)
    return StoredTensor("t", "U16", shape, len(data), file, 6)


@pytest.mark.parametrize(
    ("shape", "axis", "runs", "whole_rows"),
    [
        ((3000, 1000), 0, ((100, 2500),), False),
        ((3000, 1000), 0, ((0, 10), (2000, 3000)), False),
        ((40_000, 600), 1, ((300, 600),), True),
        ((40_000, 600), 1, ((0, 7), (100, 101), (590, 599)), True),
        ((20, 300_000), 1, ((0, 150_000),), False),
        ((3, 2_000_000), 1, ((0, 10), (20, 1_999_999)), False),
        ((7, 50, 900, 30), 2, ((3, 800),), True),
        ((2, 20_000_000), 1, ((10_000_000, 20_000_000),), False),
    ],
)
def test_any_layout_is_read_right(
    tmp_path: Path,
    shape: tuple[int, ...],
    axis: int,
    runs: tuple[tuple[int, int], ...],
    whole_rows: bool,
) -> None:
    whole = np.random.Generator(np.random.PCG64(1)).integers(0, 2**16, shape, np.uint16)
    tensor = _stored(tmp_path, whole.tobytes(), shape)
    part = AxisSlice("t", shape, axis, runs)
    assert layout_of(tensor, part).reads_whole_rows is whole_rows
    told: list[int] = []
    with TensorReader() as reader:
        array = reader.read(tensor, part, told.append)
    indices = np.concatenate([np.arange(first, past_last) for first, past_last in runs])
    np.testing.assert_array_equal(np.array(array), np.take(whole, indices, axis))
    assert reader.bytes_taken == array.nbytes
    assert reader.bytes_read <= whole.nbytes
    assert (reader.bytes_read > array.nbytes) is whole_rows
    assert told == sorted(told)
    assert all(done <= array.nbytes for done in told)


@pytest.mark.parametrize("rows", [10, 20_000])
def test_a_file_that_ends_early_is_an_error_not_a_crash(tmp_path: Path, rows: int) -> None:
    tensor = _stored(tmp_path, bytes(rows * 2000), (rows, 1000))
    os.truncate(tensor.file, rows * 1000)
    with TensorReader() as reader:
        with pytest.raises(K2Error, match="cut short"):
            reader.read(tensor, AxisSlice.whole("t", tensor.shape), lambda _: None)
        gone = replace(tensor, file=tmp_path / "gone")
        with pytest.raises(K2Error, match="No such file"):
            reader.read(gone, AxisSlice.whole("t", tensor.shape), lambda _: None)


def test_an_error_while_progress_is_told_is_raised_here(tmp_path: Path) -> None:
    def refuse(done: int) -> None:
        raise ConnectionError(f"the guard is gone after {done}")

    tensor = _stored(tmp_path, bytes(40_000_000), (20_000, 1000))
    with TensorReader() as reader, pytest.raises(ConnectionError, match="guard is gone"):
        reader.read(tensor, AxisSlice.whole("t", tensor.shape), refuse)


def test_a_plan_for_another_checkpoint_is_refused(toy_k2: Path) -> None:
    [assignment] = assignments(toy_k2, "single", 1)
    with pytest.raises(K2Error, match="the plan says 5"):
        load_part(
            msgspec.structs.replace(assignment, expected_weights_bytes=[5]), None, lambda *_: None
        )
