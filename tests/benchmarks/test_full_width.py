"""The recipe of full-width layers: sizes at full width, and a small one with its data."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks.full_width.checkpoint import FIRST_WORD, run
from benchmarks.full_width.tensors import FULL_WIDTH, layout_of
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.text.tokenizer import Tokenizer
from lab.toy_k2.vocabulary import RANK_COUNT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "small"
    assert run([str(made), "--small", "--processes", "1"]) == 0
    return made


def test_ten_layers_at_full_width_are_88_gb() -> None:
    layout = layout_of(FULL_WIDTH)
    assert round(layout.bytes / 1e9, 1) == 88.0
    assert len(layout.sizes) == 11


def test_all_data_is_written_and_only_words_are_ever_chosen(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / "full")
    assert Tokenizer.load(folder / "full").decode([FIRST_WORD]).strip() == "bab"
    for file in {tensor.file for tensor in checkpoint.tensors.values()}:
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        for name, array in arrays.items():
            last = array.reshape(-1)[-4:].astype(mx.float32)
            if not name.startswith("lm_head"):
                assert mx.all(last != 0).item(), name
        if "lm_head.scales" in arrays:
            spoken = mx.any(arrays["lm_head.scales"] != 0, axis=-1)
            assert spoken.tolist() == [FIRST_WORD <= row < RANK_COUNT for row in range(4096)]


def test_views_have_fewer_layers_or_another_name(folder: Path) -> None:
    few = read_checkpoint(folder / "few")
    assert few.config["num_hidden_layers"] == 2
    layers = {name.split(".")[2] for name in few.tensors if name.startswith("model.layers.")}
    assert layers == {"0", "1"}
    peer = json.loads((folder / "peer" / "config.json").read_text())
    assert peer["model_type"] == "deepseek_v3"
    assert "eos_token_id" not in peer
