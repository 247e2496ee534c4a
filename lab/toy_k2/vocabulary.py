"""A small vocabulary in K2's form: ranks as ``tiktoken.model`` holds them, and special tokens.

The merges are learned from the text below, which is fixed, so that every machine gets the same.
"""

from __future__ import annotations

import base64
import itertools
from collections import Counter
from typing import Any

from k2cli.models.text.tiktoken_bpe import K2_PATTERN, RESERVED_SPECIAL_TOKENS

RANK_COUNT = 768
VOCABULARY_SIZE = RANK_COUNT + RESERVED_SPECIAL_TOKENS

# Token to its distance from the last rank, and whether decoding may skip it: K2's own layout.
_SPECIAL = {
    "[BOS]": (0, True), "[EOS]": (1, True), "<|im_end|>": (2, True), "<|im_user|>": (3, True),
    "<|im_assistant|>": (4, True), "<|start_header_id|>": (6, True),
    "<|end_header_id|>": (7, True), "[EOT]": (9, True), "<|im_system|>": (10, True),
    "<|tool_calls_section_begin|>": (11, False), "<|tool_calls_section_end|>": (12, False),
    "<|tool_call_begin|>": (13, False), "<|tool_call_argument_begin|>": (14, False),
    "<|tool_call_end|>": (15, False), "<|im_middle|>": (17, True),
    "<think>": (22, False), "</think>": (23, False),
    "[UNK]": (254, True), "[PAD]": (255, True),
}  # fmt: skip

_TEXT = """\
A model of a trillion parameters does not fit into one machine, so its layers are divided among
several. Each machine keeps its own part of the weights in memory, reads what the machine before
it has computed, and sends its own result to the next one. The last machine knows the most likely
next token, and the first one waits for it. When two people ask at the same time, nobody has to
wait: while the second half of the machines works on one question, the first half works on the
other. What is the capital of France? The capital of France is Paris. What is the capital of
Germany? It is Berlin. Who wrote this sentence, and when did they write it? I don't know; it's
only here because the tokens have to come from somewhere. You can't have everything, can you?
The numbers 1, 2, 3, 10, 42, 100, 256, 1024, 2025 and 3.14159 appear in many texts, and so do
words like there, their, these, those, would, could, should, because, between, another, without.
We'll see whether they're right. He'd have said that she's the one who'll find the answer.
Once upon a time there was a small computer that wanted to think. Every morning it counted its
cores, every evening it counted its bytes, and in the night it dreamed of longer contexts.
HTTP, JSON, CPU, GPU, RAM, SSH and MPI are short names for long things. UTF-8 is one of them.

def greeting(name: str) -> str:
    if not name:
        raise ValueError("the name is empty")
    return f"Hello, {name}! How are you today?"

for index in range(10):
    total = total + values[index] * weights[index]
    print(index, total)

class Machine:
    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.layers: list[int] = []

{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}, "id": 1, "ok": true}
{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}

一个拥有一万亿参数的模型放不进一台机器，所以它的层被分到几台机器上。每台机器只保存自己的权重。
法国的首都是巴黎。德国的首都是柏林。中国的首都是北京。你好，世界！今天天气怎么样？
我们可以把模型分成两个部分：第一台机器计算前面的层，第二台机器计算后面的层。
"""


def toy_ranks() -> dict[bytes, int]:
    """Return the ranks of ``RANK_COUNT`` tokens: 256 bytes, then merges learned from the text."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(K2_PATTERN), "isolated")
    words = Counter(word.encode() for word, _ in split.pre_tokenize_str(_TEXT))
    pieces = {word: [bytes([value]) for value in word] for word in words}
    ranks = {bytes([value]): value for value in range(256)}
    while len(ranks) < RANK_COUNT:
        pair = _most_frequent_pair(pieces, words)
        ranks[pair[0] + pair[1]] = len(ranks)
        pieces = {word: _merged(parts, pair) for word, parts in pieces.items()}
    return ranks


def _most_frequent_pair(
    pieces: dict[bytes, list[bytes]], words: Counter[bytes]
) -> tuple[bytes, bytes]:
    counts: Counter[tuple[bytes, bytes]] = Counter()
    for word, parts in pieces.items():
        for pair in itertools.pairwise(parts):
            counts[pair] += words[word]
    # Equal counts are decided by the bytes, so that the order of a dict never matters.
    return max(counts, key=lambda pair: (counts[pair], pair))


def _merged(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def ranks_file(ranks: dict[bytes, int]) -> bytes:
    """Return the ranks in tiktoken's format: a line with base64 and rank for each token."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    return b"".join(lines)


def special_id(token: str) -> int:
    """Return the id of a special token of the toy."""
    return RANK_COUNT + _SPECIAL[token][0]


def toy_tokenizer_config() -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` of K2 without the entry that would run its code."""
    return {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        "added_tokens_decoder": {
            str(RANK_COUNT + distance): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for token, (distance, special) in _SPECIAL.items()
        },
    }
