"""Hostile HTTP clients against a real run: ``scripts/soak hostile``.

Twenty thousand connections to two real ranks over a ring, drawn by seed: bad framing, floods of
headers, slow senders and readers, pipelining, half-closes, huge and changed bodies; nearly half of
them are requests that a rank computes. No answer may be 500, each connection must end in bounded
time, known prompts must get their known answers, and the run must end as it began: the same
processes, no traceback in its log, memory and open files flat.

At a failure the seed, the number and what was sent are printed; ``--seed S --only N`` sends one
again, and a smaller ``--requests`` with the same seed sends the same first ones.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

import httpx
import psutil

from k2cli.settings import runs_directory
from tests.hostile.attacks import (
    KINDS,
    PROMPTS,
    Answered,
    Attack,
    carry_out,
    complaint,
    good,
    make_attack,
)
from tests.soak.loads import Watch
from tests.soak.page import (
    begin,
    measured,
    note,
    paragraph,
    parser_of,
    results_of,
    say,
    table,
    workplace,
    write_failures,
    write_section,
)
from tests.support.faults import Served, k2, serving

TITLE = "Hostile clients"
GOOD_EVERY = 10
MOST_FAILURES = 20
MEMORY_SHARE = 0.25
"""The most that a process may grow from the first tenth of the load to the last."""

LEAST_GROWTH_BYTES = 32 * 2**20
FILES_LEFT = 4
SETTLE_SECONDS = 20.0


@dataclass
class Tally:
    """What came back, over all clients."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    longest_seconds: Counter[str] = field(default_factory=Counter)
    reached: int = 0
    known_answers: int = 0
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, number: int, attack: Attack, answered: Answered, wrong: str) -> None:
        """Count one connection, and print its failure."""
        with self.lock:
            self.kinds[attack.kind] += 1
            self.statuses.update(answered.statuses)
            self.reached += attack.reaches_a_rank
            self.known_answers += len(answered.texts) if attack.prompt is not None else 0
            before = self.longest_seconds[attack.kind]
            self.longest_seconds[attack.kind] = max(before, answered.seconds)  # type: ignore[assignment]
            if wrong:
                sent = b"".join(attack.pieces)
                text = f"number {number}, {attack.kind}, {attack.ending}: {wrong}"
                self.failures.append(f"{text}; sent {sent[:300]!r}, {len(sent)} bytes")
                say(f"{text}\n  got  {answered.data[-600:]!r}\n  sent {sent[:2000]!r}")


def one_load(
    toy: Path, folder: Path, requests: int, seed: int, clients: int, only: int | None
) -> dict[str, Any]:
    """Send all attacks to one run, and return a row of results."""
    with serving(toy, "ring", "pipeline", folder) as run:
        url = httpx.URL(run.url)
        address = (url.host, url.port or 80)
        quiet = [carry_out(good(index), address).texts[0] for index in range(len(PROMPTS))]
        tally = Tally()
        watch = Watch.of(run.run_id)
        before = _processes(run)
        files = _files(watch)
        started = time.monotonic()
        numbers = iter([only]) if only is not None else iter(range(requests))
        with ThreadPoolExecutor(clients + 1) as pool:
            looking = pool.submit(watch.look, started)
            try:
                waiting = [
                    pool.submit(_client, numbers, seed, address, quiet, tally)
                    for _ in range(clients)
                ]
                for each in waiting:
                    each.result()
                seconds = time.monotonic() - started
                time.sleep(SETTLE_SECONDS)
            finally:
                watch.over.set()
            with contextlib.suppress(psutil.NoSuchProcess):
                looking.result()  # ``_state`` says that a process has gone
        wrong = [*tally.failures[:3], *_state(run, before), *_growth(watch, files)]
        readers = _readers(watch)
    return {
        "requests": sum(tally.kinds.values()), "seed": seed, "clients": clients,
        "minutes": seconds / 60, "reached": tally.reached, "known_answers": tally.known_answers,
        "kinds": dict(tally.kinds), "longest": dict(tally.longest_seconds),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "failures": len(tally.failures), "processes": _ends(watch), "readers": readers,
        "error": "; ".join(wrong),
    }  # fmt: skip


def _client(
    numbers: Iterator[int], seed: int, address: tuple[str, int], quiet: list[str], tally: Tally
) -> None:
    for number in numbers:
        if len(tally.failures) >= MOST_FAILURES:
            return
        attack = make_attack(seed, number)
        answered = carry_out(attack, address)
        tally.add(number, attack, answered, complaint(attack, answered, quiet))
        if number % GOOD_EVERY == 0:
            ordinary = good(number // GOOD_EVERY % len(PROMPTS))
            answered = carry_out(ordinary, address)
            tally.add(number, ordinary, answered, complaint(ordinary, answered, quiet))
        if number and number % 1000 == 0:
            say(f"{number} of them sent, {len(tally.failures)} not as expected")


def _processes(run: Served) -> list[tuple[int, int]]:
    (found,) = [each for each in k2("ps")["runs"] if each["run_id"] == run.run_id]
    if found["state"] != "ready":
        say(f"the run is {found['state']}: {found['cause']}")
        return []
    return [(rank["rank_pid"], rank["guard_pid"]) for rank in found["ranks"]]


def _files(watch: Watch) -> dict[str, int]:
    return {
        name: process.num_fds() for name, process in watch.processes.items() if process.is_running()
    }


def _readers(watch: Watch) -> list[int]:
    """Return the resident bytes of the processes that read requests."""
    guard = watch.processes["guard 0"]
    children = guard.children() if guard.is_running() else []
    return [
        child.memory_info().rss
        for child in children
        if "k2cli.guard.reader_process" in child.cmdline()
    ]


def _state(run: Served, before: list[tuple[int, int]]) -> Iterator[str]:
    """Say what has become of the run."""
    if _processes(run) != before:
        yield "the run is not ready with the processes of the beginning"
    elif httpx.get(f"{run.url}/health").status_code != 200:
        yield "/health is not 200 at the end"
    log = (runs_directory() / run.run_id / "run.log").read_text(errors="replace")
    if count := log.count("Traceback"):
        first = log[log.index("Traceback") :]
        say(first[:5000])
        yield f"{count} tracebacks in the log, the first: {first[:1500]}"


def _growth(watch: Watch, files: dict[str, int]) -> Iterator[str]:
    """Say which process has grown, or has kept files."""
    for name, (first, last) in _ends(watch).items():
        growth = last["resident_bytes"] - first["resident_bytes"]
        if growth > max(first["resident_bytes"] * MEMORY_SHARE, LEAST_GROWTH_BYTES):
            yield f"{name} grew by {growth / 1e6:.0f} MB"
    for name, count in _files(watch).items():
        if count > files[name] + FILES_LEFT:
            yield f"{name} has {count} files open, {files[name]} at the beginning"


def _ends(watch: Watch) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """Return what each process held in the first tenth and in the last: the medians.

    A body of 32 MiB that is being received is in the guard's memory, and then no more.
    """
    looks = [look["seen"] for look in watch.looks]
    part = max(len(looks) // 10, 1)
    return {
        name: tuple(
            {key: median_low(seen[name][key] for seen in tenth) for key in looks[0][name]}
            for tenth in (looks[:part], looks[-part:])
        )
        for name in looks[0]
    }  # type: ignore[return-value]


def page(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the section."""
    requests = sum(row["requests"] for row in results)
    lines = [
        *paragraph(
            "Clients open one raw connection after another to two ranks over a ring, each drawn by "
            "seed. No answer may be 500, each connection must end in bounded time, known prompts "
            "must get the answers of a quiet run, and at the end the run must have the same "
            "processes, no traceback in its log, and memory and open files as in the beginning."
        ),
        "",
        *paragraph(
            f"{measured(results, 'scripts/soak hostile')} {requests} connections in all, "
            f"{sum(row['reached'] for row in results)} of them with requests that a rank computes, "
            f"{sum(row['known_answers'] for row in results)} answers compared, "
            f"{sum(row['failures'] for row in results)} not as expected."
        ),
    ]
    for row in results:
        lines += _load(row)
    return lines + write_failures(results, ("requests", "seed"))


def _load(row: dict[str, Any]) -> list[str]:
    grown = "; ".join(
        f"{name} {first['resident_bytes'] / 1e6:.0f} to {last['resident_bytes'] / 1e6:.0f} MB, "
        f"{first['files']} to {last['files']} files"
        for name, (first, last) in row["processes"].items()
    )
    statuses = ", ".join(f"{status}: {count}" for status, count in row["statuses"].items())
    what = {name: str(make.__doc__).rstrip(".") for name, _, make, _ in KINDS}
    what["good"] = "A plain request after every tenth connection"
    readers = " and ".join(f"{size / 1e6:.0f} MB" for size in row["readers"])
    return [
        "",
        f"### Seed {row['seed']}: {row['requests']} connections by {row['clients']} clients in"
        f" {row['minutes']:.0f} minutes",
        "",
        *paragraph(f"Statuses: {statuses}. Medians of the first tenth and of the "
                   f"last: {grown}. The processes that read requests held {readers} at the end."),
        "",
        *table(
            "kind | connections | longest, seconds | what",
            (
                (name, row["kinds"][name], f"{row['longest'][name]:.1f}", text)
                for name, text in what.items()
                if name in row["kinds"]
            ),
        ),
    ]  # fmt: skip


def main() -> int:
    """Send what is asked for and write the section; 1 if anything was wrong."""
    parser = parser_of("hostile", __doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="send the one with this number, and write no page")
    options = parser.parse_args()
    begin(options)
    with workplace() as (folder, toy):
        row = one_load(toy, folder, options.requests, options.seed, options.clients, options.only)
    say(f"{row['requests']} connections, seed {options.seed}: {row['error'] or 'as expected'}")
    if options.only is None:
        note(options, row)
        write_section(options.docs, TITLE, page(results_of(options)))
    return 1 if row["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
