"""The table of faults: name, action, and expected result.

``k2 launch`` starts two real ranks, which the tests use over HTTP. Other requests (the witnesses)
run during each fault. Either the witnesses get the same text as in an undisturbed run, or the run
ends on all ranks with an error that names the cause. ``test_faults.py`` runs each fault once;
``scripts/soak runtime`` runs all of them on every placement and transport, in rounds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from k2cli.agent import run_processes
from k2cli.runs.record import read_record
from k2cli.settings import runs_directory

CONTEXT = 1024
CONCURRENCY = 4
TOKENS = 24
SECONDS = 120
GONE_SECONDS = 30
ALL_STOPPED_SECONDS = 15  # longer than every deadline of a run that serves
# Without it, httpx reads all certificates for each request: 25 ms of a core that ranks need.
NO_CERTIFICATES = False
WITNESSES = [[300 + seed, *range(400, 400 + 7 * seed)] for seed in (1, 2, 3)]
# Its ``sitecustomize`` puts faults into ranks: a raising sampler, a wrong digest.
FAULTY_RANKS = Path(__file__).parent / "faulty_ranks"


def k2(*arguments: str, environment: dict[str, str] | None = None) -> Any:
    """Run a k2 command and return its JSON result."""
    done = subprocess.run(
        [sys.executable, "-m", "k2cli", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass
class Served:
    """A run, and the undisturbed answers to its witnesses."""

    run_id: str
    url: str
    follower_pid: int
    trigger: Path
    quiet: list[str] = field(default_factory=list)

    def body(self, prompt: list[int], **changes: Any) -> dict[str, Any]:
        """Return a greedy request of a fixed length that uses no cached prefix."""
        return {
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "k2": {"cache": False, "ignore_stop_tokens": True},
        } | changes

    def post(
        self, prompt: list[int], *, timeout: float = SECONDS, **changes: Any
    ) -> httpx.Response:
        """Send a request without streaming."""
        body = self.body(prompt, **changes)
        return httpx.post(
            f"{self.url}/v1/completions", json=body, timeout=timeout, verify=NO_CERTIFICATES
        )

    def complete(self, prompt: list[int], **changes: Any) -> str:
        """Send a request that must succeed; return its text."""
        answer = self.post(prompt, **changes)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def leave(self, prompt: list[int], after_seconds: float, **changes: Any) -> None:
        """Send a request, and disconnect before the answer."""
        try:
            answer = self.post(prompt, timeout=after_seconds, **changes)
        except httpx.ReadTimeout:
            return
        raise AssertionError(f"it was answered before it was dropped: {answer.text[:100]}")

    def drop(self, prompt: list[int], after_chunks: int, **changes: Any) -> None:
        """Start a stream, and disconnect after some chunks."""
        body = self.body(prompt, stream=True, max_tokens=400, **changes)
        url = f"{self.url}/v1/completions"
        with httpx.stream(
            "POST", url, json=body, timeout=SECONDS, verify=NO_CERTIFICATES
        ) as answer:
            assert answer.status_code == 200
            for index, _ in enumerate(answer.iter_lines()):
                if index >= after_chunks:
                    return

    def undisturbed_by(self, fault: Callable[[Served], None]) -> None:
        """Send the witnesses' requests repeatedly during the fault, and at least once after it."""
        over = threading.Event()
        begun = threading.Barrier(len(WITNESSES) + 1)

        def witness(index: int) -> None:
            begun.wait(SECONDS)
            while True:
                last = over.is_set()
                assert self.complete(WITNESSES[index]) == self.quiet[index]
                if last:
                    return

        with ThreadPoolExecutor(len(WITNESSES)) as pool:
            answers = [pool.submit(witness, index) for index in range(len(WITNESSES))]
            begun.wait(SECONDS)
            try:
                fault(self)
            finally:
                over.set()
            for answer in answers:
                answer.result(SECONDS)
        assert httpx.get(f"{self.url}/health").status_code == 200

    def ended_by(self, fault: Callable[[Served], None], cause: str) -> float:
        """Check that the run ends on all ranks and reports the cause.

        Returns:
            Seconds from the fault until no process of the run was left.
        """
        begun = threading.Barrier(len(WITNESSES) + 1)

        def witness(index: int) -> str:
            """Return the answer to a client whose request the fault interrupts."""
            assert self.complete(WITNESSES[index]) == self.quiet[index]
            begun.wait(SECONDS)
            while True:
                # The request is long, so that it is running when the fault happens.
                try:
                    answer = self.post(WITNESSES[index], max_tokens=CONTEXT - 100)
                except httpx.TransportError as error:
                    return f"{type(error).__name__}: {error}"
                if answer.status_code != 200:
                    return answer.text
                text = answer.json()["choices"][0]["text"]
                assert text.startswith(self.quiet[index].rstrip("\N{REPLACEMENT CHARACTER}"))

        with ThreadPoolExecutor(len(WITNESSES)) as pool:
            told = [pool.submit(witness, index) for index in range(len(WITNESSES))]
            begun.wait(SECONDS)
            time.sleep(0.5)
            fault(self)
            started = time.monotonic()
            while run_processes.processes_of_run(self.run_id):
                assert time.monotonic() - started < GONE_SECONDS, "processes are left"
                time.sleep(0.05)
            seconds = time.monotonic() - started
            errors = [answer.result(SECONDS) for answer in told]
        assert any(cause in error for error in errors), errors
        while (run := self._record())["state"] not in ("failed", "lost"):
            assert time.monotonic() - started < GONE_SECONDS, run
            time.sleep(0.1)
        assert cause in run["cause"], run["cause"]
        return seconds

    def _record(self) -> dict[str, Any]:
        (run,) = [run for run in k2("ps")["runs"] if run["run_id"] == self.run_id]
        return dict(run)


@contextmanager
def serving(
    toy: Path, backend: str, strategy: str, folder: Path, concurrency: int = CONCURRENCY
) -> Iterator[Served]:
    """Start a run of two ranks of the toy, in which every fault can be raised."""
    trigger = folder / f"lie-{backend}-{strategy}"
    trigger.unlink(missing_ok=True)
    paths = [str(FAULTY_RANKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = k2(
        "launch", str(toy), "--nodes", "localhost,localhost", "--backend", backend,
        "--parallel", strategy, "--context", str(CONTEXT), "--concurrency", str(concurrency),
        "--dtype", "float32", "--detach",
        environment={"PYTHONPATH": os.pathsep.join(paths), "FAULTY_RANKS_LIE": str(trigger)},
    )  # fmt: skip
    try:
        started = Served(run["run_id"], run["url"], run["ranks"][1]["rank_pid"], trigger)
        started.quiet = [started.complete(prompt) for prompt in WITNESSES]
        assert len(set(started.quiet)) == len(WITNESSES)
        yield started
    finally:
        k2("stop", run["run_id"])


# --- the faults ----------------------------------------------------------------------------------


def _prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(300, 900), k=length)


def _drop_in_queue(run: Served) -> None:
    """Drop requests that wait: each needs a whole context, and there is memory for four."""

    def leave(seed: int) -> None:
        run.leave([300 + seed], 0.5, max_tokens=CONTEXT - 10)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(12)))


def _malformed(field_name: str, **changes: Any) -> Callable[[Served], None]:
    def send(run: Served) -> None:
        answer = run.post(**{"prompt": [301], **changes})
        assert 400 <= answer.status_code < 500, answer.text
        assert field_name in answer.text

    return send


def _many_clients(run: Served) -> None:
    expected = run.complete([305, 306, 307], max_tokens=6)

    def client(number: int) -> None:
        if number % 2:
            run.drop([305, 306, 307], number % 5)
        else:
            assert run.complete([305, 306, 307], max_tokens=6) == expected

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))


def _evict(run: Served) -> None:
    """Run 20 conversations in turn, with caches of 256 tokens and memory for at most 16."""
    starts = [_prompt(30, 500 + number) for number in range(20)]
    fresh = [run.complete(start, max_tokens=4) for start in starts[:4]]
    caching = {"cache": True, "ignore_stop_tokens": True}
    with ThreadPoolExecutor(4) as pool:
        passes = [
            list(pool.map(lambda start: run.complete(start, max_tokens=4, k2=caching), starts))
            for _ in range(2)
        ]
    assert passes[0] == passes[1]
    assert passes[0][:4] == fresh


def _broken_sampler(run: Served) -> None:
    answer = run.post([310], seed=666, temperature=0.5)
    assert answer.status_code == 500, answer.text
    assert "the sampler of this request is broken" in answer.text


def _pause(run: Served) -> None:
    os.kill(run.follower_pid, signal.SIGSTOP)
    try:
        time.sleep(5)
    finally:
        os.kill(run.follower_pid, signal.SIGCONT)


def _pause_all(run: Served) -> None:
    """Stop the supervisor and all processes of the run; continue them one after another."""
    record = read_record(runs_directory() / run.run_id)
    assert record is not None
    pids = [record.pid]
    pids += [process.pid for process in run_processes.processes_of_run(run.run_id)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(ALL_STOPPED_SECONDS)
    finally:
        for pid in random.sample(pids, len(pids)):
            os.kill(pid, signal.SIGCONT)
            time.sleep(1.0 / len(pids))


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    ``cause`` is empty if the fault must not affect the witnesses. Otherwise the run must end, and
    ``cause`` is a part of the message for clients and in ``k2 ps``. A long one is for soak only.
    """

    name: str
    how: str
    do: Callable[[Served], None]
    cause: str = ""
    long: bool = False

    @property
    def expected(self) -> str:
        """Describe the expected result in words."""
        return f"the run ends: “{self.cause}”" if self.cause else "others get their very tokens"


FAULTS = (
    Fault("plain stream dropped", "the client leaves after three chunks",
          lambda run: run.drop([310, 311], 3)),
    Fault("seeded stream dropped", "the same, with seed and temperature",
          lambda run: run.drop([310, 311], 3, seed=7, temperature=0.9)),
    Fault("dropped in prefill", "900 prompt tokens, the client leaves after 0.05 s",
          lambda run: run.leave(_prompt(900), 0.05, max_tokens=100)),
    Fault("dropped in the queue", "12 requests of a whole context each, room for 4",
          _drop_in_queue),
    Fault("wrong field", '`"stop": [5]`', _malformed("stop", stop=[5])),
    Fault("prompt too long", "one token more than the context",
          _malformed("prompt", prompt=_prompt(CONTEXT + 1))),
    Fault("64 clients, half vanish", "32 leave after 0 to 4 chunks", _many_clients),
    Fault("cache evicts all the time", "20 conversations twice, room for 16", _evict),
    Fault("sampler raises", "an exception inside one request's sampler", _broken_sampler),
    Fault("follower stopped for 5 s", "SIGSTOP, SIGCONT", _pause),
    Fault("everything stopped for 15 s", "SIGSTOP, SIGCONT in any order", _pause_all, long=True),
    Fault("follower stopped for ever", "SIGSTOP",
          lambda run: os.kill(run.follower_pid, signal.SIGSTOP), "it was stopped (SIGSTOP)"),
    Fault("follower killed", "SIGKILL",
          lambda run: os.kill(run.follower_pid, signal.SIGKILL), "it was killed by SIGKILL"),
    Fault("wrong digest", "a follower misreports what it holds",
          lambda run: run.trigger.touch(), "rank 1 disagrees with the leader"),
)  # fmt: skip
HARMLESS = tuple(fault for fault in FAULTS if not fault.cause)
FATAL = tuple(fault for fault in FAULTS if fault.cause)
