"""The prefix cache on disk, with real ranks that are started again and again."""

from __future__ import annotations

import random
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from k2cli.prefix_folder import prefixes_directory, stores
from k2cli.protocol import EngineReady
from k2cli.rank.loader import load_part
from k2cli.rank.startup.prefix_disk import rank_identity, run_identity
from tests.support.rank_pool import RankPool, assignments, running
from tests.support.weights import random_mlx_model

pytestmark = pytest.mark.ranks

PROMPT = random.Random(5).choices(range(300, 900), k=530)
LIMIT_SECONDS = 60.0
OPTIONS: dict[str, Any] = {
    "context_length": 1024, "prefill_chunk_tokens": 256, "prefix_disk_bytes": 10**8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path / "cache"))


def _started(
    checkpoint: Path, folder: Path, strategy: str, size: int, **changes: Any
) -> AbstractContextManager[RankPool]:
    return running(RankPool(assignments(checkpoint, strategy, size, **OPTIONS | changes), folder))


def _asked(pool: RankPool, scope: str = "", prompt: list[int] = PROMPT) -> tuple[list[int], int]:
    """Return the answer, and how many tokens of the prompt were not computed."""
    outcome = pool.outcome(pool.submit(prompt, 3, prefix_scope=scope))
    assert outcome.finished is not None
    return outcome.tokens, outcome.finished.cached_tokens


def _blocks(rank: int = 0) -> list[Path]:
    found = [path for path in prefixes_directory().glob(f"*-{rank}/*/*") if path.name[0] != "."]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_later_run_finds_the_caches_of_an_earlier_one(toy_k2: Path, tmp_path: Path) -> None:
    with _started(toy_k2, tmp_path, "single", 1) as pool:
        answer, cached = _asked(pool)
        _wait_for(lambda: len(_blocks()) == 2)
        assert [store.in_use for store in stores()] == [True]
    assert cached == 0
    modes = {path.stat().st_mode & 0o777 for path in prefixes_directory().rglob("*")}
    assert modes == {0o700, 0o600}
    later, first = _blocks()
    later.write_bytes(later.read_bytes()[:-1000] + bytes(1000))

    # The second block is damaged: it is removed, computed and written again.
    with _started(toy_k2, tmp_path, "single", 1) as pool:
        assert _asked(pool) == (answer, 256)
        _wait_for(lambda: later.exists() and later.read_bytes()[-1000:] != bytes(1000))
        assert _asked(pool, "a") == (answer, 0)  # the user of another key
        _wait_for(lambda: len(_blocks()) == 4)

    with _started(toy_k2, tmp_path, "single", 1) as pool:
        assert _asked(pool) == (answer, 512)
        assert _asked(pool, "a") == (answer, 512)
    assert first.exists()


def test_a_full_disk_costs_no_answer(
    toy_k2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks whose files may have 300 kB, less than a block of the toy."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    pool = RankPool(assignments(toy_k2, "single", 1, **OPTIONS), tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with running(pool):
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            answer, _ = _asked(pool)
            _wait_for(lambda: "switched off" in capfd.readouterr().err)
            assert _asked(pool) == (answer, 529)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err == ""  # one warning is enough
    assert not list(prefixes_directory().glob("*/*/*"))


def test_a_model_whose_caches_cannot_be_cut_says_that_none_is_on_disk(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "rms_norm_eps": 1e-6, "vocab_size": 64, "rope_theta": 10000.0,
        "rope_local_base_freq": 10000.0, "rope_traditional": False, "query_pre_attn_scalar": 16,
        "sliding_window": 32, "sliding_window_pattern": 2, "max_position_embeddings": 1024,
        "eos_token_id": 2,
    }  # fmt: skip
    checkpoint = random_mlx_model(tmp_path / "model", config)
    with _started(checkpoint, tmp_path, "single", 1) as pool:
        [ready] = [each for each in pool.ranks[0].seen if isinstance(each, EngineReady)]
    assert ready.remark.startswith("no prefix cache on disk: the caches of this model hold windows")
    assert stores() == []


def test_a_store_belongs_to_model_placement_types_and_caches(toy_k2: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(toy_k2, copied)
    (assignment,) = assignments(copied, "single", 1)
    stage = load_part(assignment, None, lambda done, total: None).stage
    own = rank_identity(assignment, stage)
    assert own == rank_identity(assignment, stage)
    names = {run_identity(assignment, [own])}
    names |= {
        run_identity(replace(assignment, **change), [own])
        for change in (
            {"dtype": "float16"},
            {"layers": [(0, 1), (1, 4)]},
            {"head": "sharded"},
            {"strategy": "tensor"},
            {"size": 2},
        )
    }
    for path in [*copied.glob("*.safetensors"), copied / "config.json"][-2:]:
        path.write_bytes(path.read_bytes() + b" ")
        names.add(run_identity(assignment, [rank_identity(assignment, stage)]))
    assert len(names) == 8


@pytest.mark.parametrize("strategy", ["pipeline", pytest.param("tensor", marks=pytest.mark.soak)])
def test_ranks_agree_on_what_is_stored(toy_k2: Path, tmp_path: Path, strategy: str) -> None:
    with _started(toy_k2, tmp_path, strategy, 2) as pool:
        answer, _ = _asked(pool)
        _wait_for(lambda: len(_blocks(0)) == len(_blocks(1)) == 2)
    _blocks(1)[0].unlink()  # the second block
    with _started(toy_k2, tmp_path, strategy, 2, concurrency=2) as pool:
        # Another answer goes on while blocks are read.
        other = pool.submit([*range(300, 340)], 30, use_prefix_cache=False)
        assert _asked(pool) == (answer, 256)
        longer = [*PROMPT[:300], *range(300, 340)]
        again, cached = _asked(pool, prompt=longer)
        assert cached == 300
        assert again == pool.generate(longer, 3, use_prefix_cache=False)
        assert len(pool.outcome(other).tokens) == 30
        _wait_for(lambda: len(_blocks(0)) == len(_blocks(1)) == 2)
