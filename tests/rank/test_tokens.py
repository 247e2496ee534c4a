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
# After a prompt of 230 tokens.
LONG_TOKENS = 12
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
    return _reference_tokens(checkpoint, _prompts(checkpoint, texts), count)


def _reference_tokens(checkpoint: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    command = [sys.executable, "-c", _REFERENCE, str(checkpoint), json.dumps(prompts), str(count)]
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
    assert _tokens(toy_k2, tmp_path, "tensor", 2, SOME_TOKENS, head="sharded") == expected


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "size", "settings"),
    [
        ("pipeline", 2, {"attention_block_tokens": 16}),
        ("tensor", 2, {"attention_block_tokens": 16}),
        pytest.param("tensor", 2, {"attention_block_tokens": 0}, marks=pytest.mark.soak),
        pytest.param("pipeline", 2, {"attention_block_tokens": 0}, marks=pytest.mark.soak),
    ],
)
def test_toy_k2_tokens_after_a_long_prompt(
    strategy: str, size: int, settings: dict[str, Any], toy_k2: Path, tmp_path: Path
) -> None:
    """Attention is computed absorbed, and in blocks, from the second chunk on."""
    prompt = _long_prompt()
    expected = _reference_tokens(toy_k2, [prompt], LONG_TOKENS)[0]
    assert len(set(expected)) > 5
    changes = {"prefill_chunk_tokens": 32, "context_length": 1024, **settings}
    pool = RankPool(assignments(toy_k2, strategy, size, **changes), tmp_path)
    with running(pool):
        found = [pool.generate(prompt, LONG_TOKENS), pool.generate(prompt, LONG_TOKENS)]
    assert found == [expected] * 2  # the second one begins with the kept prefix


def _long_prompt() -> list[int]:
    return [7 + index * 31 % 300 for index in range(230)]
