"""The toys of the benchmark: words only, no end, the same model otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.checkpoints import SMALL_TOY, make_toy, word_prompt, words
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("models") / "toy", SMALL_TOY)


def test_a_prompt_has_as_many_tokens_as_asked_for(toy: Path) -> None:
    tokenizer = Tokenizer.load(toy)
    prompt = word_prompt(300, seed=7)
    tokens = tokenizer.encode(prompt)
    assert len(tokens) == 300
    assert tokenizer.decode(tokens) == prompt
    assert word_prompt(300, seed=8) != prompt


def test_each_word_is_one_token_and_text_at_once(toy: Path) -> None:
    tokenizer = Tokenizer.load(toy)
    assert len(set(words())) == len(words()) == 512
    stream = tokenizer.stream()
    tokens = tokenizer.encode(word_prompt(50, seed=1))
    assert all(stream.push(token).strip() in words() for token in tokens)


def test_nothing_ends_an_answer_and_all_floats_are_float32(toy: Path) -> None:
    checkpoint = read_checkpoint(toy)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"U32", "F32"}
    assert "eos_token_id" not in json.loads((toy / "config.json").read_text())
    assert Tokenizer.load(toy).stop_tokens == frozenset()


def test_a_toy_that_is_there_is_not_made_again(toy: Path) -> None:
    before = (toy / "model.safetensors").stat().st_mtime_ns
    assert make_toy(toy, SMALL_TOY) == toy
    assert (toy / "model.safetensors").stat().st_mtime_ns == before
