"""Checkpoints with a sentencepiece model alone, against sentencepiece itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from k2cli.errors import K2Error
from k2cli.models.text.tokenizer import Tokenizer

TEXTS = [
    "the quick brown fox", "  two  spaces and a tab\t.", "Grüße, 世界! \U0001f600", "", "a", " ",
    "don't stop; x = [1, 2, 3]\n\nnew paragraph", "ﬁne ligature and ① circle",
]  # fmt: skip
CORPUS = [
    "the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs",
    "don't stop the music; it is a fine paragraph", "numbers 1 2 3 and x = [1, 2, 3]",
] * 20  # fmt: skip


def train(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=360, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<|call|>"], **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", **LLAMA},
        {"model_type": "bpe", **LLAMA, "add_dummy_prefix": False},  # Gemma
        {"model_type": "unigram", **LLAMA},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
    ],
    ids=["llama", "gemma", "unigram", "nfkc"],
)
def test_it_cuts_text_as_sentencepiece_does(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = train(tmp_path, **options)
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == theirs.decode(ids)


def test_the_begin_token_and_added_tokens_are_those_of_the_config(tmp_path: Path) -> None:
    theirs = train(tmp_path, model_type="bpe", **LLAMA)
    size = theirs.get_piece_size()
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "added_tokens_decoder": {str(size): {"content": "<|im_end|>", "special": True}},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("fox", add_special_tokens=True) == [theirs.bos_id(), *theirs.encode("fox")]
    assert ours.token_id("<|im_end|>") == size
    assert ours.encode("fox<|im_end|>")[-1] == size
    assert ours.stop_tokens == {theirs.eos_id()}


def test_a_class_with_rules_of_its_own_is_refused(tmp_path: Path) -> None:
    train(tmp_path, model_type="bpe", **LLAMA)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    with pytest.raises(K2Error, match="'ChatGLMTokenizer', whose rules k2 does not know"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xff not protobuf", "is not a sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "is a Git LFS pointer"),
    ],
)
def test_a_damaged_model_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(K2Error, match=words):
        Tokenizer.load(tmp_path)
