"""Random workloads on real ranks: every answer is the one that its request gets alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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
