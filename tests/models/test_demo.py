"""The converted demo model compared with its GGUF, read by the format's library and PyTorch."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import regex
from mlx_lm.utils import load_model

from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.text.tokenizer import Tokenizer
from tests.models.gguf_files import interleaved
from tests.models.prompts import PROMPTS, TEXTS, random_text

HEADS, KEY_VALUE_HEADS, HEAD = 9, 3, 64
TOLERANCE = 1e-3  # measured: 1.1e-4 for logits of up to 35


@pytest.fixture(scope="module")
def reader(demo_gguf: Path) -> gguf.GGUFReader:
    """Read the GGUF with the format's library."""
    return gguf.GGUFReader(demo_gguf)


@pytest.fixture(scope="module")
def prompt_tokens(demo_checkpoint: Path) -> list[list[int]]:
    """The shortest prompts and a conversation: the CPU takes 0.1 s a token."""
    tokenizer = Tokenizer.load(demo_checkpoint)
    prompts = sorted((tokenizer.encode(prompt) for prompt in PROMPTS), key=len)
    turns = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "你好，世界"}]
    return [*prompts[:19], tokenizer.encode(tokenizer.chat_prompt(turns))]


@pytest.fixture(scope="module")
def our_logits(demo_checkpoint: Path, prompt_tokens: list[list[int]]) -> np.ndarray:
    """Logits of the last position, float32: ``[prompts, vocabulary]``."""
    model, _ = load_model(demo_checkpoint)
    model.set_dtype(mx.float32)
    # The head, a fifth of the work, for the last position only.
    last = [model.model(mx.array([tokens]))[0, -1] for tokens in prompt_tokens]
    return np.stack([np.array(model.model.embed_tokens.as_linear(hidden)) for hidden in last])


def _expanded(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }


def test_every_packed_weight_is_the_files(demo_checkpoint: Path, reader: gguf.GGUFReader) -> None:
    arrays: Any = mx.load(str(demo_checkpoint / "model.safetensors"))
    for layer, part, name, heads in (
        (0, "attn_q", "self_attn.q_proj", HEADS),
        (29, "attn_k", "self_attn.k_proj", KEY_VALUE_HEADS),
        (7, "attn_v", "self_attn.v_proj", 0),
        (15, "ffn_down", "mlp.down_proj", 0),
    ):
        tensor = next(t for t in reader.tensors if t.name == f"blk.{layer}.{part}.weight")
        prefix = f"model.layers.{layer}.{name}"
        ours = np.array(_dequantized(arrays, prefix, 4))
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(interleaved(ours, heads) if heads else ours, theirs), prefix
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    theirs = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    assert np.array_equal(np.array(_dequantized(arrays, "model.embed_tokens", 8)), theirs)


def _dequantized(arrays: Any, prefix: str, bits: int) -> mx.array:
    scales, biases = (
        arrays[f"{prefix}.{part}"].astype(mx.float32) for part in ("scales", "biases")
    )
    return mx.dequantize(arrays[f"{prefix}.weight"], scales, biases, group_size=32, bits=bits)


def test_checkpoint_is_no_larger_than_the_file(demo_checkpoint: Path, demo_gguf: Path) -> None:
    checkpoint = read_checkpoint(demo_checkpoint)
    packed = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype == "U32"]
    assert len(packed) == 7 * 30 + 1
    assert checkpoint.stored_bytes <= demo_gguf.stat().st_size
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.tensors


def _rotated(x: np.ndarray, theta: float) -> np.ndarray:
    """Apply RoPE like llama.cpp, which rotates neighbours 2i and 2i + 1. x: [tokens, heads, 64]."""
    angles = np.arange(x.shape[0])[:, None] * theta ** (-np.arange(0, HEAD, 2) / HEAD)
    cos, sin = np.cos(angles)[:, None].astype(x.dtype), np.sin(angles)[:, None].astype(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def _normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def _attention(x: np.ndarray, weights: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    count = len(x)
    query = _rotated((x @ weights[f"{prefix}.attn_q.weight"].T).reshape(count, HEADS, HEAD), 1e5)
    key = (x @ weights[f"{prefix}.attn_k.weight"].T).reshape(count, KEY_VALUE_HEADS, HEAD)
    value = (x @ weights[f"{prefix}.attn_v.weight"].T).reshape(count, KEY_VALUE_HEADS, HEAD)
    repeats = HEADS // KEY_VALUE_HEADS
    key, value = (np.repeat(part, repeats, axis=1) for part in (_rotated(key, 1e5), value))
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(np.float32(HEAD))
    scores += np.triu(np.full((count, count), -np.inf, np.float32), 1)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", scores, value).reshape(count, -1)
    return mixed @ weights[f"{prefix}.attn_output.weight"].T


def _reference_logits(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Run the llama model in numpy on the file's weights; return the last position's logits."""
    x = weights["token_embd.weight"][tokens]
    for layer in range(30):
        prefix = f"blk.{layer}"
        x = x + _attention(_normed(x, weights[f"{prefix}.attn_norm.weight"]), weights, prefix)
        h = _normed(x, weights[f"{prefix}.ffn_norm.weight"])
        gate = h @ weights[f"{prefix}.ffn_gate.weight"].T
        gate = gate / (1 + np.exp(-gate)) * (h @ weights[f"{prefix}.ffn_up.weight"].T)
        x = x + gate @ weights[f"{prefix}.ffn_down.weight"].T
    last = _normed(x[-1], weights["output_norm.weight"])
    return last @ weights["token_embd.weight"].T


def _compare(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert len(ours) >= 20
    assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist()
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.slow
def test_logits_equal_those_of_an_independent_reading(
    reader: gguf.GGUFReader, prompt_tokens: list[list[int]], our_logits: np.ndarray
) -> None:
    weights = _expanded(reader)
    theirs = np.stack([_reference_logits(weights, tokens) for tokens in prompt_tokens])
    _compare(our_logits, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers and torch warn about one another
def test_logits_equal_those_of_transformers(
    demo_gguf: Path, prompt_tokens: list[list[int]], our_logits: np.ndarray
) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch, an optional reference, is not installed")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read a GGUF")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(demo_gguf.parent), gguf_file=demo_gguf.name, dtype=torch.float32
    )
    with torch.no_grad():
        theirs = [model(torch.tensor([tokens])).logits[0, -1].numpy() for tokens in prompt_tokens]
    _compare(our_logits, np.stack(theirs))


# --- tokenizer ----------------------------------------------------------------------------------

_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def _naive_encoding(text: str, ranks: dict[tuple[str, str], int], ids: dict[str, int]) -> list[int]:
    """Encode by byte-level BPE: each digit apart, GPT-2's words, then the best merge first."""
    letters = _gpt2_letters()
    tokens: list[int] = []
    for piece in regex.split(r"(\p{N})", text):
        for word in _WORDS.findall(piece):
            parts = [letters[value] for value in word.encode()]
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                best = min(range(len(pairs)), key=lambda at: ranks.get(pairs[at], 10**9))
                if pairs[best] not in ranks:
                    break
                parts[best : best + 2] = ["".join(pairs[best])]
            tokens += [ids[part] for part in parts]
    return tokens


def _gpt2_letters() -> dict[int, str]:
    shown = [v for v in range(256) if chr(v).isprintable() and chr(v) not in " \xa0\xad"]
    hidden = [value for value in range(256) if value not in shown]
    return {v: chr(v) for v in shown} | {v: chr(256 + at) for at, v in enumerate(hidden)}


def test_tokens_equal_a_naive_encoding_of_the_files_merges(
    demo_checkpoint: Path, reader: gguf.GGUFReader
) -> None:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    ids = {token: number for number, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    tokenizer = Tokenizer.load(demo_checkpoint)
    source = random.Random(5)
    for text in (*TEXTS, *(random_text(source) for _ in range(1000))):
        if any(unicodedata.category(letter) == "Cn" for letter in text):
            continue  # which characters are letters depends on the version of Unicode
        assert tokenizer.encode(text) == _naive_encoding(text, ranks, ids), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_format_and_stop_tokens(demo_checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(demo_checkpoint)
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.stop_tokens == {2}
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, 2]
    assert tokenizer.vocabulary_size == 49152
    assert json.loads((demo_checkpoint / "config.json").read_text())["model_type"] == "llama"
