"""A cold start is not a hang: real ranks that are slow at work, or hang, with short time limits.

With the limits of real runs, and all combinations: ``scripts/soak -k cold_start``.
"""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import psutil
import pytest
from msgspec.structs import replace

from k2cli.choices import Parallel
from k2cli.protocol import Deadlines
from tests.support.cold_start import SHORT, Delay, How, launched, warmed_up
from tests.support.faults import NO_CERTIFICATES, SECONDS

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

# Longer than every limit for a rank that does nothing, and the other one's.
_LONG = 1.5 * SHORT.peer_stall
_FULL = Deadlines()


def _ask(url: str, tokens: int) -> None:
    body = {"prompt": list(range(300, 300 + tokens)), "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600, verify=NO_CERTIFICATES)
    assert answer.status_code == 200, answer.text


def _survives(delay: Delay, model: Path, parallel: Parallel, deadlines: Deadlines = SHORT) -> None:
    """Check a rank that is slow in the warm-up, and again at the first long prompt."""
    assert delay.after is not None
    with launched(model, parallel, delay, deadlines=deadlines) as run:
        assert run.state == "ready", run.cause
        delay.after.touch()
        _ask(run.url or "", 300)


def _is_ended(
    model: Path, parallel: Parallel, rank: int, how: How, deadlines: Deadlines, within: float
) -> None:
    begun = time.monotonic()
    with launched(model, parallel, Delay(rank, how, 4 * within), deadlines=deadlines) as run:
        failure = run.failure
        assert failure is not None, run
        assert failure.rank == rank, failure.cause
        assert "it made no progress for" in failure.cause
        assert "while warming up" in failure.cause
        assert failure.cause.endswith("(warm-up: self-test)")
        assert ("nothing but" if how == "spin" else "no processor time") in failure.cause or (
            "although there was work" in failure.cause
        ), failure.cause
    assert time.monotonic() - begun < within + SECONDS


@pytest.mark.parametrize(
    ("parallel", "rank", "how"), [("tensor", 1, "touch"), ("pipeline", 0, "child")]
)
def test_a_rank_that_is_slow_but_works_is_not_ended(
    toy_k2: Path, tmp_path: Path, parallel: Parallel, rank: int, how: How
) -> None:
    _survives(Delay(rank, how, _LONG, tmp_path / "again"), toy_k2, parallel)


@pytest.mark.parametrize(("parallel", "rank"), [("tensor", 0), ("pipeline", 1)])
def test_a_rank_that_hangs_in_the_warm_up_is_ended_and_named(
    toy_k2: Path, parallel: Parallel, rank: int
) -> None:
    _is_ended(toy_k2, parallel, rank, "hang", SHORT, 2 * SHORT.peer_stall)


def test_a_rank_whose_compiler_hangs_is_ended_and_its_compiler_too(toy_k2: Path) -> None:
    with launched(toy_k2, "tensor", Delay(1, "stuck-child", 300.0)) as run:
        assert run.failure is not None, run
        assert run.failure.rank == 1
        assert "used no processor time (warm-up: self-test)" in run.failure.cause
        mark = f"child-of-{run.run_id}"
        commands = (process.info["cmdline"] for process in psutil.process_iter(["cmdline"]))
        assert not [command for command in commands if mark in (command or ())]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_that_hangs_before_loading_is_ended_while_the_other_one_waits(
    toy_k2: Path, rank: int
) -> None:
    deadlines = replace(SHORT, load_stall=2.5, work_stall=90.0)
    delay = Delay(rank, "hang", 300.0, loading=True)
    with launched(toy_k2, "pipeline", delay, deadlines=deadlines) as run:
        assert run.failure is not None, run
        assert run.failure.rank == rank
        # Not the limit of one that works: the leader counts steps while it waits.
        assert "while loading, and used" in run.failure.cause


@pytest.mark.parametrize("parallel", [pytest.param("tensor", marks=pytest.mark.soak), "pipeline"])
def test_all_shapes_of_a_gpu_are_warmed_up_visibly_on_every_rank(
    toy_k2: Path, parallel: Parallel
) -> None:
    with launched(toy_k2, parallel, device="cuda", concurrency=3) as run:
        assert run.state == "ready", run.cause
        expected = [
            "1 of 11: self-test",
            *(f"{number} of 11: prefill of {tokens} tokens"
              for number, tokens in enumerate((16, 32, 64, 128), start=2)),
            "6 of 11: prefill of 491 tokens and 20 more",
            "7 of 11: 2 requests at once",
            "8 of 11: 3 requests at once",
            *(f"{number} of 11: a draft of {tokens} tokens"
              for number, tokens in enumerate((3, 7, 15), start=9)),
        ]  # fmt: skip
        assert warmed_up(run, 0) == warmed_up(run, 1) == expected
        _ask(run.url or "", 100)


# --- full length --------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["touch", "child", "read"])
def test_in_full_length_a_rank_that_works_is_not_ended(
    toy_k2: Path, tmp_path: Path, parallel: Parallel, rank: int, how: How
) -> None:
    _survives(Delay(rank, how, 165.0, tmp_path / "again"), toy_k2, parallel, _FULL)


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
@pytest.mark.parametrize("rank", [0, 1])
def test_in_full_length_a_rank_that_hangs_is_ended(
    toy_k2: Path, parallel: Parallel, rank: int
) -> None:
    _is_ended(toy_k2, parallel, rank, "hang", _FULL, 2 * _FULL.peer_stall)
