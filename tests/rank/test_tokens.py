"""Greedy float32 tokens are those of mlx-lm in one process, wherever the model is placed."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.rank_pool import RankPool, assignments, running

MAX_TOKENS = 64
# The demo does seven tokens a second on a CPU, also of a prompt: the daily tests use a part of it,
# in chunks small enough that there are several; the long tests use all of it.
FEW_TOKENS = 6
FEW_TEXTS = 2
FEW_CHUNK_TOKENS = 4
# For placements that are slow on two cores; a difference shows in the first tokens.
SOME_TOKENS = 24
LONG_PROMPT = [7 + index * 31 % 300 for index in range(110)]
LONG_TOKENS = 6
TEXTS = [
    "The capital of France is",
    "水在摄氏一百度",
    "List three uses of copper: " * 6,  # more than one chunk
    "def fibonacci(n):\n    ",
    "Once upon a time in a village by the sea",
]

# Runs in a process of its own: stock mlx-lm, imported whole.
_REFERENCE = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model, _ = load_model(Path(folder))
model.set_dtype(mx.float32)
result = []
for prompt in prompts:
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    result.append([token for token, _ in steps])
json.dump(result, sys.stdout)
"""


def _prompts(checkpoint: Path, texts: int = len(TEXTS)) -> list[list[int]]:
    from k2cli.models.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint)
    return [tokenizer.encode(text) for text in TEXTS[:texts]]


@functools.cache
def _reference(checkpoint: Path, count: int, texts: int = len(TEXTS)) -> list[list[int]]:
    prompts = json.dumps(_prompts(checkpoint, texts))
    command = [sys.executable, "-c", _REFERENCE, str(checkpoint), prompts, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tokens: list[list[int]] = json.loads(done.stdout)
    return tokens


@pytest.fixture(scope="module")
def toy_reference(toy_k2: Path) -> list[list[int]]:
    return _reference(toy_k2, MAX_TOKENS)


def _tokens(
    checkpoint: Path,
    folder: Path,
    strategy: str,
    size: int,
    count: int = MAX_TOKENS,
    texts: int = len(TEXTS),
    **changes: Any,
) -> list[list[int]]:
    pool = RankPool(assignments(checkpoint, strategy, size, **changes), folder)
    with running(pool):
        return [pool.generate(prompt, count) for prompt in _prompts(checkpoint, texts)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("count", "texts", "chunk"),
    [
        pytest.param(FEW_TOKENS, FEW_TEXTS, FEW_CHUNK_TOKENS, id="few"),
        pytest.param(MAX_TOKENS, len(TEXTS), 32, id="all", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize(("strategy", "size"), [("single", 1), ("pipeline", 2)])
def test_demo_tokens_equal_mlx_lm(
    strategy: str,
    size: int,
    count: int,
    texts: int,
    chunk: int,
    demo_checkpoint: Path,
    tmp_path: Path,
) -> None:
    expected = _reference(demo_checkpoint, count, texts)
    changes = {"prefill_chunk_tokens": chunk}
    assert _tokens(demo_checkpoint, tmp_path, strategy, size, count, texts, **changes) == expected


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "size", "count"),
    [
        ("single", 1, MAX_TOKENS),
        ("pipeline", 2, MAX_TOKENS),
        ("tensor", 2, MAX_TOKENS),
        ("pipeline", 5, SOME_TOKENS),
    ],
)
def test_toy_k2_tokens_equal_mlx_lm(
    strategy: str,
    size: int,
    count: int,
    toy_k2: Path,
    toy_reference: list[list[int]],
    tmp_path: Path,
) -> None:
    expected = [tokens[:count] for tokens in toy_reference]
    # A toy that repeats one token would prove little.
    assert all(len(set(tokens)) > 5 for tokens in expected)
    assert _tokens(toy_k2, tmp_path, strategy, size, count) == expected


@pytest.mark.ranks
def test_toy_k2_tokens_with_the_head_cut(
    toy_k2: Path, toy_reference: list[list[int]], tmp_path: Path
) -> None:
    expected = [tokens[:SOME_TOKENS] for tokens in toy_reference]
    changes: dict[str, Any] = {"head": "sharded", "meets": True}
    assert _tokens(toy_k2, tmp_path, "tensor", 2, SOME_TOKENS, **changes) == expected


@pytest.fixture(scope="module")
def long_reference(toy_k2: Path) -> list[int]:
    """Return the tokens of mlx-lm's class in this process, which is quicker than another one."""
    from benchmarks.gpu_layers import loaded, plain_loop

    return plain_loop(loaded(toy_k2, "float32")[0], LONG_PROMPT, LONG_TOKENS)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "size", "block_tokens"),
    [
        ("pipeline", 2, 16),
        ("tensor", 2, 16),
        pytest.param("tensor", 2, 0, marks=pytest.mark.soak),
        pytest.param("pipeline", 2, 0, marks=pytest.mark.soak),
    ],
)
def test_toy_k2_tokens_after_a_long_prompt(
    strategy: str,
    size: int,
    block_tokens: int,
    toy_k2: Path,
    long_reference: list[int],
    tmp_path: Path,
) -> None:
    """The last chunks are computed absorbed, and with ``block_tokens`` all of them in blocks."""
    assert len(set(long_reference)) > 3
    changes: dict[str, Any] = {"attention_block_tokens": block_tokens}
    pool = RankPool(assignments(toy_k2, strategy, size, **changes), tmp_path)
    with running(pool):
        first, again = (pool.generate(LONG_PROMPT, LONG_TOKENS) for _ in range(2))
    assert first == long_reference
    assert again == long_reference  # it begins with the kept prefix
