"""The toy K2: always the same, loadable by mlx-lm as it is, and lively enough to test with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from k2cli.errors import K2Error, UsageError
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.text.tokenizer import Tokenizer
from lab.toy_k2.checkpoint import ToyShape, build_toy_k2
from tests.conftest import ROOT
from tests.models.prompts import PROMPTS

# A change of these is a change of what every test with the toy runs on.
WEIGHTS_SHA256 = "6b0f09e04d9749149fd2e87ffc0c762857f1457c8f11d802a4a44a5c4effcfef"
VOCABULARY_SHA256 = "7ba8c0ba7bc199618a7dc75bfb099cf16e090d4f3ef40d8b9c1870ae945ed696"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_bytes_on_every_machine(toy_k2: Path) -> None:
    assert _sha256(toy_k2 / "tiktoken.model") == VOCABULARY_SHA256
    assert _sha256(toy_k2 / "model.safetensors") == WEIGHTS_SHA256


def test_seed_and_shape_matter(toy_k2: Path, tmp_path: Path) -> None:
    other = build_toy_k2(tmp_path / "other", seed=1)
    assert _sha256(other / "model.safetensors") != _sha256(toy_k2 / "model.safetensors")
    deeper = build_toy_k2(tmp_path / "deeper", ToyShape(layers=7))
    assert read_checkpoint(deeper).config["num_hidden_layers"] == 7
    first, second = (
        mx.load(str(folder / "model.safetensors"))["model.layers.1.self_attn.o_proj.weight"]
        for folder in (toy_k2, deeper)
    )
    assert mx.array_equal(first, second)
    with pytest.raises(K2Error, match="already exists"):
        build_toy_k2(deeper)


def test_greedy_answers_are_repeatable_and_varied(toy_k2: Path) -> None:
    tokenizer = Tokenizer.load(toy_k2)
    answers = []
    for prompt in PROMPTS[:5]:
        tokens = mx.array(
            tokenizer.encode(tokenizer.chat_prompt([{"role": "user", "content": prompt}]))
        )
        runs = []
        for _ in range(2):
            model, _ = load_model(toy_k2)  # strict: every parameter, and nothing else
            runs.append([int(token) for token, _ in generate_step(tokens, model, max_tokens=24)])
        assert runs[0] == runs[1]
        answers.append(tuple(runs[0]))
        assert len(set(runs[0])) > 12
    assert len(set(answers)) == len(answers)


def test_logits_are_spread(toy_k2: Path) -> None:
    tokenizer = Tokenizer.load(toy_k2)
    model, _ = load_model(toy_k2)
    logits = model(mx.array([tokenizer.encode(" ".join(PROMPTS))]))[0]
    best = mx.sort(logits, axis=-1)[:, -2:]
    gaps = best[:, 1] - best[:, 0]
    assert logits.dtype == mx.float32
    assert 3 < mx.std(logits).item() < 12
    assert mx.min(gaps).item() > 1e-3  # rounding differs by some 1e-5: no tie is decided by it


@pytest.mark.parametrize("bits", [8, None])
def test_other_precisions_load(tmp_path: Path, bits: int | None) -> None:
    folder = build_toy_k2(tmp_path / "toy", ToyShape(layers=3, bits=bits))
    model, config = load_model(folder)
    assert ("quantization" in config) == (bits is not None)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()


@pytest.mark.parametrize(
    "sizes", [{"layers": 1}, {"hidden": 100}, {"experts": 2}, {"bits": 3}, {"heads": 0}]
)
def test_shapes_that_make_no_model_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        ToyShape(**sizes)


def test_the_script_builds_one(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make-toy-k2"), str(tmp_path / "toy")]
    options = ["--layers", "2", "--hidden", "128", "--experts", "8", "--seed", "3"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'toy'}\n"), done.stderr
    config = json.loads((tmp_path / "toy" / "config.json").read_text())
    assert (config["hidden_size"], config["n_routed_experts"]) == (128, 8)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "already exists" in again.stderr
