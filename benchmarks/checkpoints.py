"""The checkpoints that both programs serve: everything but packed weights in float32.

``mlx_lm.server`` computes in the type that the checkpoint has and has no option for another, and
on MLX's CPU device float16 is some thirty times slower than float32. So both get a checkpoint
that is float32, and compute the same.

The toys get a vocabulary of words in place of their own, of which only whole words are ever
chosen: then each token is text at once (a part of a character would be held back, and its moment
lost), the two programs' answers can be compared word by word, and no answer ends early.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.models.layout import INDEX_NAME
from k2cli.models.text.tiktoken_bpe import byte_letters
from lab.toy_k2.checkpoint import ToyShape, build_toy_k2
from lab.toy_k2.vocabulary import RANK_COUNT, VOCABULARY_SIZE

if TYPE_CHECKING:
    import mlx.core as mx

_BYTES = 256
_WEIGHTS_NAME = "model.safetensors"

LARGE_TOY = ToyShape(
    layers=8,
    hidden=512,
    heads=8,
    experts=128,
    experts_per_token=4,
    q_lora=256,
    kv_lora=128,
    rope=32,
    nope=64,
    value=64,
    dense_intermediate=1280,
    expert_intermediate=256,
)
"""Computing dominates: about 25 ms a token on one core of a server CPU, 270 MB stored."""

SMALL_TOY = ToyShape()
"""Overheads show: about 4 ms a token."""


def words() -> list[str]:
    """One word of three letters for each id from 256 to the last rank."""
    consonants = "bdfgklmnprstvz"
    made = itertools.product(consonants, "aeiou", consonants)
    return ["".join(letters) for letters in itertools.islice(made, RANK_COUNT - _BYTES)]


def word_prompt(count: int, seed: int) -> str:
    """A prompt of ``count`` tokens of a toy; another seed gives another first token."""
    chosen = random.Random(seed).choices(words(), k=count)
    return "".join(f" {word}" for word in chosen)


def make_toy(folder: Path, shape: ToyShape, seed: int = 0) -> Path:
    """A toy K2 with the vocabulary of words, unless ``folder`` holds it already."""
    if (folder / "config.json").is_file():
        return folder
    original = folder.with_name(f"{folder.name}.original")
    shutil.rmtree(original, ignore_errors=True)
    build_toy_k2(original, shape, seed)
    specials = special_tokens(original)
    copy_in_float32(original, folder, whole_words_only=True)
    (folder / "tiktoken.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(word_tokenizer(specials)))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.rmtree(original)
    return folder


def copy_in_float32(source: Path, target: Path, *, whole_words_only: bool = False) -> Path:
    """Copy a checkpoint, all of whose floats become float32, into one file with an index.

    No end-of-text token is left in its configuration, so that answers have the length asked for.
    """
    import mlx.core as mx

    if (target / "config.json").is_file():
        return target
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
    tensors: dict[str, mx.array] = {}
    for file in sorted(source.glob("*.safetensors")):
        opened = mx.load(str(file))
        assert isinstance(opened, dict)
        tensors.update(opened)
    floats = (mx.float16, mx.bfloat16)
    tensors = {n: t.astype(mx.float32) if t.dtype in floats else t for n, t in tensors.items()}
    if whole_words_only:
        _silence_others(tensors)
    # mlx-lm's pipeline wants an index, even of one file.
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), _WEIGHTS_NAME),
    }
    mx.save_safetensors(str(partial / _WEIGHTS_NAME), tensors, {"format": "mlx"})
    (partial / INDEX_NAME).write_text(json.dumps(index))
    _forget_end_tokens(partial)
    partial.rename(target)
    return target


def _silence_others(tensors: dict[str, mx.array]) -> None:
    """Set the logits of bytes and special tokens to 0; the best of 512 words is always above."""
    import mlx.core as mx

    ids = mx.arange(VOCABULARY_SIZE)
    spoken = ((ids >= _BYTES) & (ids < RANK_COUNT))[:, None]
    for name in ("lm_head.scales", "lm_head.biases"):
        tensors[name] = mx.where(spoken, tensors[name], 0.0)


def _forget_end_tokens(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            document: dict[str, Any] = json.loads(path.read_text())
            document.pop("eos_token_id", None)
            if document.get("model_type") == "kimi_k2":
                # The same model class in both programs; transformers, which reads the tokenizer
                # for mlx-lm, has no configuration of the name kimi_k2 and stumbles.
                document["model_type"] = "deepseek_v3"
            path.write_text(json.dumps(document))
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text())
    document.pop("eos_token", None)
    path.write_text(json.dumps(document))


def special_tokens(folder: Path) -> dict[int, str]:
    named = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    names = {int(number): entry["content"] for number, entry in named.items()}
    return {
        number: names.get(number, f"<|reserved_token_{number}|>")
        for number in range(RANK_COUNT, VOCABULARY_SIZE)
    }


def word_tokenizer(specials: dict[int, str]) -> dict[str, Any]:
    """``tokenizer.json``: bytes, whole words with a space before them, special tokens."""
    letters = byte_letters()
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {f"{letters[32]}{w}": n for n, w in enumerate(words(), start=_BYTES)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, **flags, "special": True}
            for number, text in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [],
        },
    }
