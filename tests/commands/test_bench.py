"""``k2 bench``: its sizes, its arithmetic, its formats, and the whole command on a real server."""

from __future__ import annotations

import csv
import io
import json
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator

import pytest

from k2cli.bench.cases import BenchCase, check_context, make_cases, parse_sizes
from k2cli.bench.formats import to_csv, to_json_lines, to_sql
from k2cli.bench.measure import RepetitionDone, RowDone, measure
from k2cli.bench.prompts import PromptMaker
from k2cli.bench.report import BenchReport, BenchRow, RunDescription, Sample, mean_and_deviation
from k2cli.client.client import Completion
from k2cli.errors import K2Error, UsageError
from k2cli.protocol import Finished, Generate, PromptProgress, Tokens
from k2cli.server.engine_client import EngineEvent, EngineUnavailable
from k2cli.server.served_model import ServedModel
from k2cli.ui.bench_table import BenchLine, bench_markdown
from tests.server.commands import run_k2
from tests.server.scripted import ScriptedEngine, serving

PREFILL_RATE, DECODE_RATE = 1000.0, 50.0


# --- sizes and prompts --------------------------------------------------------------------------


def test_sizes() -> None:
    assert parse_sizes("512, 2048,0", "-p") == [512, 2048, 0]
    assert parse_sizes("2k, 16k", "-p") == [2048, 16384]
    cases = make_cases([512, 0], [128], [0, 4096], [1, 4])
    assert [case.name for case in cases] == [
        "pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096",
        "pp512 c4", "tg128 c4", "pp512 @ d4096 c4", "tg128 @ d4096 c4",
    ]  # fmt: skip
    for wrong in ("", "a", "1,,2", "-1", "1.5"):
        with pytest.raises(UsageError):
            parse_sizes(wrong, "-p")
    with pytest.raises(UsageError, match="the minimum is 1"):
        parse_sizes("0", "-c", at_least=1)
    with pytest.raises(UsageError, match="nothing to measure"):
        make_cases([0], [0], [0], [1])
    check_context([BenchCase("tg", 10, depth=89)], 100)
    with pytest.raises(UsageError, match=r"tg10 @ d90 needs a context of 101 .* has 100"):
        check_context([BenchCase("tg", 10, depth=90)], 100)


@pytest.mark.parametrize("letters_per_token", [1, 3, 40])
def test_prompts_have_the_exact_length_and_differ(letters_per_token: int) -> None:
    def tokenize(text: str) -> list[int]:
        return [
            sum(map(ord, text[i : i + letters_per_token]))
            for i in range(0, len(text), letters_per_token)
        ]

    maker = PromptMaker(tokenize, random.Random(1))
    for length in (1, 2, 512):
        prompts = [maker.make(length) for _ in range(5)]
        assert {len(prompt) for prompt in prompts} == {length}
        assert length < 10 or len({tuple(prompt[:10]) for prompt in prompts}) == 5
    with pytest.raises(K2Error, match="cannot make a prompt of 5 tokens"):
        PromptMaker(lambda text: [1]).make(5)


# --- arithmetic ---------------------------------------------------------------------------------


def completion(
    started: float, times: tuple[float, ...], *, cached: int = 0, counted: bool = False
) -> Completion:
    """Return a completion whose tokens come at ``times``, from a server without timings."""
    return Completion(
        started_at=started,
        first_token_at=times[0],
        last_token_at=times[-1],
        ended_at=times[-1],
        prompt_tokens=0,
        completion_tokens=len(times),
        cached_tokens=cached,
        timings=None,
        token_times=times if counted else (),
    )


class Clockwork:
    """A server on a clock of its own: one request at a time, at known rates."""

    def __init__(self, cached: int = 0) -> None:
        self._now = 0.0
        self._cached = cached
        self._lock = threading.Lock()

    @property
    def now(self) -> float:
        return self._now

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def complete(self, prompt: list[int], tokens: int) -> Completion:
        with self._lock:
            started = 0.0 if self._now < 1e9 else self._now
            first = self._now + len(prompt) / PREFILL_RATE
            last = first + (tokens - 1) / DECODE_RATE
            self._now = last
        return completion(started, (first, last), cached=self._cached)


@pytest.mark.parametrize(
    ("case", "rate"),
    [
        (BenchCase("pp", 500), PREFILL_RATE),
        (BenchCase("tg", 20), DECODE_RATE),
        (BenchCase("tg", 20, depth=300), DECODE_RATE),
        # Served one after the other: the prompts add up.
        (BenchCase("pp", 500, concurrency=4), PREFILL_RATE),
    ],
)
def test_rates_by_the_clients_clock(case: BenchCase, rate: float) -> None:
    events = list(measure(Clockwork(), [case], 1))
    warm_up = events[0]
    assert isinstance(warm_up, RepetitionDone)
    assert warm_up.sample.tokens_per_second == pytest.approx(rate)
    row = events[-1]
    assert isinstance(row, RowDone)
    assert (row.row.clock, len(row.row.samples)) == ("client", 1)


class Staggered:
    """Answers two requests at ten tokens a second each; the second one's prompt takes a second."""

    def __init__(self) -> None:
        self._asked = 0
        self._lock = threading.Lock()

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def complete(self, prompt: list[int], tokens: int) -> Completion:
        with self._lock:
            first = float(self._asked % 2)
            self._asked += 1
        # The first one waits for the second one's prompt after its first token.
        later = [1.0 + 0.1 * (index + 1) for index in range(tokens - 1)]
        return completion(0.0, (first, *later), counted=True)


def test_answers_at_once_are_measured_while_all_are_being_answered() -> None:
    events = list(measure(Staggered(), [BenchCase("tg", 20, concurrency=2)], 1))
    row = events[-1]
    assert isinstance(row, RowDone)
    assert row.row.samples[0].tokens_per_second == pytest.approx(20.0)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(K2Error, match="took 7 prompt tokens from a cache"):
        list(measure(Clockwork(cached=7), [BenchCase("pp", 10)], 1))


def test_sample_standard_deviation() -> None:
    assert mean_and_deviation([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(1.2909944487358056))
    assert mean_and_deviation([3.0]) == (3.0, None)


# --- formats ------------------------------------------------------------------------------------


def report() -> BenchReport:
    rows = (
        BenchRow(
            BenchCase("pp", 512),
            "server",
            (Sample(131.0, 3.9, 3.95), Sample(132.0, 3.88, 3.9), Sample(131.5, 3.89, 3.91)),
        ),
        BenchRow(BenchCase("tg", 128, depth=4096), "client", (Sample(9.876, 12.96, 0.25),)),
    )
    environment = {"k2": "0.1", "mlx": None, "python": "3.11", "system": "Linux", "machine": "x"}
    run = RunDescription("demo-1a2b", "mpi", "pipeline", 8192, ("mac's", "mac2"))
    return BenchReport("demo", "http://x/v1", rows, run, environment, "2026-01-01T00:00:00+00:00")


def test_markdown() -> None:
    placement = report().placement
    lines = [
        BenchLine(
            "demo",
            placement,
            row.case.name,
            mean_and_deviation(row.rates),
            mean_and_deviation(row.first_token),
        )
        for row in report().rows
    ]
    assert (
        bench_markdown(lines)
        == """\
| model | placement              |          test |           t/s |     ttft (ms) |
| ----- | ---------------------- | ------------: | ------------: | ------------: |
| demo  | pipeline, 2 ranks, mpi |         pp512 | 131.50 ± 0.50 | 3920.0 ± 26.5 |
| demo  | pipeline, 2 ranks, mpi | tg128 @ d4096 |          9.88 |         250.0 |"""
    )


def test_machine_readable_formats_agree() -> None:
    lines = [json.loads(line) for line in to_json_lines(report()).splitlines()]
    assert [line["test"] for line in lines] == ["pp512", "tg128 @ d4096"]
    assert lines[0]["run"]["nodes"] == ["mac's", "mac2"]
    flat = list(csv.DictReader(io.StringIO(to_csv(report()))))
    assert json.loads(flat[0]["samples"]) == lines[0]["samples"]
    with sqlite3.connect(":memory:") as database:
        database.executescript(to_sql(report()))
        found = database.execute(
            "SELECT test, tokens_per_second, tokens_per_second_deviation, nodes, ranks "
            "FROM k2_bench"
        ).fetchall()
    database.close()
    assert found == [
        ("pp512", 131.5, 0.5, "mac's,mac2", 2),
        ("tg128 @ d4096", 9.876, None, "mac's,mac2", 2),
    ]


# --- the command --------------------------------------------------------------------------------


class CountingEngine(ScriptedEngine):
    """Generates exactly what is asked for, and reports fixed rates as its own timings."""

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        self.submitted.append(request)
        name, count = request.request_id, request.max_tokens
        yield PromptProgress(name, len(request.prompt), len(request.prompt))
        for index in range(count):
            # A lone half of a character has no text: counting chunks must not depend on it.
            yield Tokens(name, [0xD83D if index == 0 else 97])
        prefill, decode = len(request.prompt) / PREFILL_RATE, (count - 1) / DECODE_RATE
        prompt_tokens = len(request.prompt)
        yield Finished(name, "length", prompt_tokens, count, 0, 0.0, prefill, decode)


def test_a_run_lost_between_two_rows_leaves_the_first() -> None:
    class Mortal(CountingEngine):
        async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
            if len(self.submitted) == 2:
                raise EngineUnavailable("rank 1 was lost")
            async for event in super().submit(request):
                yield event

    with serving(Mortal(), ServedModel("toy", context_length=120)) as url:
        done = run_k2("bench", "--url", url, "-p", "8", "-n", "4", "-r", "1", "-o", "json")
    assert done.returncode == 5
    assert "rank 1 was lost" in done.stderr
    assert [row["test"] for row in json.loads(done.stdout)["rows"]] == ["pp8"]


def test_the_command_measures_by_the_servers_clock() -> None:
    engine = CountingEngine()
    sizes = ["-p", "64", "-n", "10", "-d", "0,32", "-r", "2"]
    began = time.monotonic()
    with serving(engine, ServedModel("toy", context_length=120)) as url:
        done = run_k2("bench", "--url", url, *sizes, "-o", "json")
        table = run_k2("bench", "--url", url, "-p", "16", "-n", "0", "-c", "2", "-r", "1")
        too_long = run_k2("bench", "--url", url, "-p", "120")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema_version"], document["model"], document["run"]) == (1, "toy", None)
    assert set(document["environment"]) == {"k2", "mlx", "python", "system", "machine"}
    rows = {row["test"]: row for row in document["rows"]}
    assert list(rows) == ["pp64", "tg10", "pp64 @ d32", "tg10 @ d32"]
    for row in rows.values():
        expected = PREFILL_RATE if row["kind"] == "pp" else DECODE_RATE
        assert row["tokens_per_second"] == pytest.approx(expected)
        assert (row["clock"], len(row["samples"])) == ("server", 2)
        assert 0 < row["first_token_seconds"] < time.monotonic() - began
    assert "a warm-up and " in done.stderr.splitlines()[0]
    assert "pp64: warm-up: 1000.00 t/s" in done.stderr
    assert "tg10: run 2 of 2: 50.00 t/s" in done.stderr
    lengths = [(len(request.prompt), request.max_tokens) for request in engine.submitted]
    assert lengths[:6] == [(64, 1)] * 3 + [(1, 11)] * 3
    assert sorted(lengths[6:12]) == [(32, 1)] * 3 + [(96, 1)] * 3
    assert all(request.stop_tokens == [] for request in engine.submitted)
    assert not any(request.use_prefix_cache for request in engine.submitted)
    assert len({tuple(request.prompt) for request in engine.submitted}) > 12
    assert table.returncode == 0, table.stderr
    assert "| pp16 c2 |" in table.stdout
    assert too_long.returncode == 2
    assert "the server has 120" in too_long.stderr
