"""Random workloads on real ranks: every answer is the one that its request gets alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.prefix_folder import stores
from lab.toy_k2.vocabulary import special_id
from tests.rank.engine.workload import Workload
from tests.support.grammars import LIST, lark
from tests.support.rank_pool import RankPool, assignments, running

CONTEXT = 512
END = special_id("<|im_end|>")
GRAMMARS = [lark(LIST), lark('start: "ab" /[a-z]{3,20}/ "."'), lark("start: ( nope")]
ROUNDS = int(os.environ.get("K2_WORKLOADS", "5"))

# Strategy, ranks, whole contexts that there is room for, and whether steps are built ahead.
SHORT = [("single", 1, 1, True), ("pipeline", 2, 1, True), ("tensor", 2, 1, True)]
LONG = [
    *SHORT,
    ("pipeline", 2, 2, True),
    ("single", 1, 2, False),
    ("single", 1, 4, True),
    ("pipeline", 2, 1, False),
    ("pipeline", 2, 4, True),
    ("tensor", 2, 2, False),
]


@pytest.fixture
def pool(request: pytest.FixtureRequest, toy_k2: Path, tmp_path: Path) -> Iterator[RankPool]:
    strategy, size, concurrency, ahead = request.param
    parts = assignments(
        toy_k2,
        strategy,
        size,
        concurrency=concurrency,
        context_length=CONTEXT,
        looks_ahead=ahead,
        speculation="always",
    )
    with running(RankPool(parts, tmp_path)) as started:
        yield started


def _name(placement: tuple[object, ...]) -> str:
    return "-".join(map(str, placement))


@pytest.mark.ranks
@pytest.mark.parametrize("pool", SHORT, indirect=True, ids=_name)
def test_every_answer_is_that_of_its_request_alone(pool: RankPool) -> None:
    workload = Workload(pool, 5, CONTEXT, GRAMMARS, END, longest_prompt=60)
    workload.begin_with_a_pause()
    workload.run(11)
    workload.check()
    assert workload.pauses
    assert workload.accepted_tokens > 10


@pytest.mark.soak
@pytest.mark.parametrize("pool", LONG, indirect=True, ids=_name)
def test_many_workloads(pool: RankPool) -> None:
    """``K2_WORKLOADS`` of them, of 40 requests each."""
    for seed in range(ROUNDS):
        workload = Workload(pool, seed, CONTEXT, GRAMMARS, END)
        workload.run(40, 600.0)
        workload.check()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("strategy", "size"), [("single", 1), ("pipeline", 2), ("tensor", 2)])
def test_prefixes_from_a_disk_change_no_answer(
    toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, size: int
) -> None:
    """The same workload in runs one after another, on disks with room for a part of it."""
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path / "cache"))
    parts = assignments(
        toy_k2, strategy, size, concurrency=8, context_length=1024, prefill_chunk_tokens=256,
        prefix_disk_bytes=4_000_000,
    )  # fmt: skip
    found, read = list[int](), 0
    for _ in range(2):
        with running(RankPool(parts, tmp_path)) as pool:
            workload = Workload(pool, 11, 1024, longest_prompt=400)
            workload.run(8, 600.0)
            time.sleep(2.0)  # what is kept is written while no request runs
            found.append(sum(store.tokens for store in stores()) // size)
            ends = [pool.outcomes[name].finished for name in workload.sent]
            read += sum(end.cached_tokens >= 256 for end in ends if end is not None)
            workload.check()
    assert found[0] > 0
    assert read > 0
