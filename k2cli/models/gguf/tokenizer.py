"""Conversion of a GGUF's tokenizer and chat template to Hugging Face's files.

GGUF holds the vocabulary and merges of a byte-level BPE, but only the *name* of the rule that
splits text before merging (``tokenizer.ggml.pre``). The supported rules are below.
"""

from __future__ import annotations

from typing import Any

from k2cli.errors import K2Error
from k2cli.models.gguf.reader import GgufFile
from k2cli.models.json_files import shown

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types of llama.cpp

_BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "default": [_BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    "llama-bpe": [_split(_LLAMA3_PATTERN), {**_BYTE_LEVEL, "use_regex": False}],
}
# A word in llama 3's vocabulary is one token, even if no sequence of merges produces it.
_IGNORE_MERGES = frozenset({"llama-bpe"})


def tokenizer_files(file: GgufFile, vocabulary_size: int) -> dict[str, dict[str, Any]]:
    """Make the tokenizer, tokenizer config and generation config, by the name of their file.

    Raises:
        K2Error: if the kind of tokenizer is not supported, or it contradicts itself.
    """
    tokens = _strings(file, "tokenizer.ggml.tokens")
    if len(tokens) != vocabulary_size:
        raise K2Error(f"{file.path} has {len(tokens)} tokens for {vocabulary_size} embeddings")
    added = _added_tokens(file, tokens)
    return {
        "tokenizer.json": _tokenizer(file, tokens, added),
        "tokenizer_config.json": _tokenizer_config(file, tokens, added),
        "generation_config.json": _generation_config(file, len(tokens)),
    }


def _tokenizer(file: GgufFile, tokens: list[str], added: list[dict[str, Any]]) -> dict[str, Any]:
    model = file.metadata.get("tokenizer.ggml.model")
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise K2Error(
            f"{file.path} has a {shown(model)} tokenizer; k2 imports byte-level BPE ('gpt2')"
        )
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise K2Error(f"{file.path} cuts text by the rule {shown(pre)}; k2 knows {known}")
    merges = [merge.split(" ") for merge in _strings(file, "tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise K2Error(f"{file.path} has a merge that is not of two tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": _post_processor(file, tokens),
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _IGNORE_MERGES,
            "vocab": _vocabulary(file, tokens),
            "merges": merges,
        },
    }


def _vocabulary(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise K2Error(f"{file.path} has the same token twice in its vocabulary")
    return vocabulary


def _post_processor(file: GgufFile, tokens: list[str]) -> dict[str, Any] | None:
    start = _token_id(file, "bos", len(tokens))
    if not file.metadata.get("tokenizer.ggml.add_bos_token") or start is None:
        return None
    token = tokens[start]
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [start], "tokens": [token]}},
    }


def _added_tokens(file: GgufFile, tokens: list[str]) -> list[dict[str, Any]]:
    types = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise K2Error(f"{file.path} does not give a type for each token")
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _tokenizer_config(
    file: GgufFile, tokens: list[str], added: list[dict[str, Any]]
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
        },
    }
    for gguf_name, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = _token_id(file, gguf_name, len(tokens))
        if number is not None:
            config[f"{name}_token"] = tokens[number]
    if context := file.metadata.get("llama.context_length"):
        config["model_max_length"] = context
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def _generation_config(file: GgufFile, count: int) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if (start := _token_id(file, "bos", count)) is not None:
        config["bos_token_id"] = start
    ends = [_token_id(file, name, count) for name in ("eos", "eot", "eom")]
    config["eos_token_id"] = sorted({end for end in ends if end is not None})
    return config


def _token_id(file: GgufFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise K2Error(f"{file.path}: {key} is {shown(value)}, the vocabulary has {count} tokens")
    return value


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise K2Error(f"{file.path} has no list of strings at {key}")
    return value
