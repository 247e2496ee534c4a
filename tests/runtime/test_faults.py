"""Faults that must not matter: after each, other requests get the very text of a quiet run.

Two real ranks under guards, spoken to over HTTP while other requests are running. Where a fault
must end the run instead, it ends everywhere, with an error that names the cause.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from k2cli.runtime.protocol import Sampling
from tests.cluster.test_commands import k2
from tests.runtime.rank_pool import RankPool, assignments, running

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

CONTEXT = 1024
TOKENS = 24
WITNESSES = [[300 + seed, *range(400, 400 + 7 * seed)] for seed in (1, 2, 3)]
SECONDS = 120


@dataclass
class Served:
    """A run, and what its witnesses say when nothing disturbs them."""

    url: str
    follower_pid: int
    quiet: list[str]

    def body(self, prompt: list[int], **changes: Any) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "k2": {"cache": False, "ignore_stop_tokens": True},
        } | changes

    def complete(self, prompt: list[int], **changes: Any) -> str:
        answer = httpx.post(
            f"{self.url}/v1/completions", json=self.body(prompt, **changes), timeout=SECONDS
        )
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def drop(self, prompt: list[int], after_chunks: int, **changes: Any) -> None:
        """Begin a stream and walk away."""
        body = self.body(prompt, stream=True, max_tokens=400, **changes)
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=body, timeout=SECONDS
        ) as answer:
            assert answer.status_code == 200
            for index, _ in enumerate(answer.iter_lines()):
                if index >= after_chunks:
                    return

    def undisturbed_by(self, fault: Callable[[], object]) -> None:
        """The witnesses run while the fault happens; and once more after it."""
        with ThreadPoolExecutor(len(WITNESSES)) as pool:
            answers = [pool.submit(self.complete, prompt) for prompt in WITNESSES]
            time.sleep(0.2)
            fault()
            assert [answer.result(SECONDS) for answer in answers] == self.quiet
        assert [self.complete(prompt) for prompt in WITNESSES] == self.quiet
        assert httpx.get(f"{self.url}/health").status_code == 200


@pytest.fixture(scope="module", params=["pipeline", "tensor"])
def served(request: pytest.FixtureRequest, toy_k2: Path) -> Iterator[Served]:
    done = k2(
        "launch", str(toy_k2), "--nodes", "localhost,localhost", "--parallel", request.param,
        "--context", str(CONTEXT), "--concurrency", "8", "--detach", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    try:
        started = Served(run["url"], run["ranks"][1]["rank_pid"], [])
        started.quiet = [started.complete(prompt) for prompt in WITNESSES]
        assert len(set(started.quiet)) == len(WITNESSES)
        yield started
    finally:
        k2("stop", run["run_id"])


def _long_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(300, 900), k=length)


@pytest.mark.shared_state
def test_a_dropped_plain_stream(served: Served) -> None:
    served.undisturbed_by(lambda: served.drop([310, 311], 3))


@pytest.mark.shared_state
def test_a_dropped_seeded_stream(served: Served) -> None:
    served.undisturbed_by(lambda: served.drop([310, 311], 3, seed=7, temperature=0.9))


@pytest.mark.shared_state
def test_a_request_dropped_in_prefill(served: Served) -> None:
    def drop() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{served.url}/v1/completions",
                json=served.body(_long_prompt(CONTEXT - 100)),
                timeout=0.3,
            )

    served.undisturbed_by(drop)


@pytest.mark.shared_state
def test_a_request_dropped_in_the_queue(served: Served) -> None:
    """The plan has room for 8 whole contexts; more such requests have to wait."""

    def drop(seed: int) -> None:
        body = served.body([300 + seed], max_tokens=CONTEXT - 10)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=body, timeout=1.0)

    def drop_many() -> None:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(drop, range(12)))

    served.undisturbed_by(drop_many)


@pytest.mark.shared_state
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stop": [5]}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"prompt": list(range(300, 300 + CONTEXT + 1))}, "prompt"),
        ({"model": "another"}, "model"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
    ],
    ids=["stop", "temperature", "context", "model", "negative", "vocabulary"],
)
def test_a_malformed_request_is_refused_by_name(
    served: Served, changes: dict[str, Any], field: str
) -> None:
    def send() -> None:
        body = served.body([301]) | changes
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=SECONDS)
        assert 400 <= answer.status_code < 500, answer.text
        assert field in answer.text

    served.undisturbed_by(send)


@pytest.mark.shared_state
def test_64_clients_of_which_half_vanish(served: Served) -> None:
    expected = served.complete([305, 306, 307], max_tokens=6)

    def client(number: int) -> None:
        if number % 2:
            served.drop([305, 306, 307], number % 5)
        else:
            assert served.complete([305, 306, 307], max_tokens=6) == expected

    def all_clients() -> None:
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(client, range(64)))

    served.undisturbed_by(all_clients)


@pytest.mark.shared_state
def test_a_follower_stopped_for_5_seconds(served: Served) -> None:
    def pause() -> None:
        os.kill(served.follower_pid, signal.SIGSTOP)
        resume = threading.Timer(5.0, os.kill, (served.follower_pid, signal.SIGCONT))
        resume.start()
        resume.join()

    served.undisturbed_by(pause)


# --- faults inside a rank -----------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["pipeline", "tensor"])
def test_a_raising_sampler_ends_its_own_request(
    strategy: str, toy_k2: Path, tmp_path: Path
) -> None:
    parts = assignments(toy_k2, strategy, 2, concurrency=4)
    pool = RankPool(
        parts,
        tmp_path,
        worker="tests.runtime.faulty_worker",
        environment={"K2_TEST_FAULT": "sampler"},
    )
    with running(pool):
        quiet = [pool.generate(prompt, TOKENS) for prompt in WITNESSES]
        names = [pool.submit(prompt, TOKENS) for prompt in WITNESSES]
        broken = pool.submit([310], 8, Sampling(temperature=0.5, seed=666))
        outcome = pool.outcome(broken)
        assert outcome.error == "sampling failed: the sampler of this request is broken"
        assert [pool.outcome(name).tokens for name in names] == quiet


@pytest.mark.parametrize("strategy", ["pipeline", "tensor"])
def test_a_follower_with_a_wrong_digest_ends_the_run(
    strategy: str, toy_k2: Path, tmp_path: Path
) -> None:
    parts = assignments(toy_k2, strategy, 2)
    pool = RankPool(
        parts,
        tmp_path,
        worker="tests.runtime.faulty_worker",
        environment={"K2_TEST_FAULT": "digest"},
    )
    with running(pool), pytest.raises(RuntimeError, match="rank 1 disagrees with the leader"):
        pool.generate([301], 200)
