"""Many clients at once, of which many misbehave: ``scripts/soak clients``.

64 clients for ten minutes on two real ranks over a ring: a third of their requests are left in the
middle of the answer, some are streams that nobody reads. Answers to fixed prompts must be those of
a quiet run, open files and the guards' memory must stay flat, a rank must stay within its plan, and
``/health`` must stay quick: its 99th percentile at most five times that of the idle run. It is
asked by a process of its own, ten times a second on a new connection each time, as a monitor does.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from k2cli.settings import runs_directory
from tests.soak.loads import SLICES, Watch, _spread
from tests.soak.mix import Answer, Ask, Mix, client
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
from tests.support.faults import WITNESSES, Served, serving

TITLE = "Many clients"
CONCURRENCY = 8
IDLE_SECONDS = 60.0
PROBE_SECONDS = 0.1
TIMES_SLOWER = 5.0
ANSWER_SECONDS = 600.0
"""An answer may wait for 63 others."""

UNREAD_SECONDS = 20.0
LEAST_GROWTH_BYTES = 32 * 2**20
FILES_LEFT = 4
SETTLE_SECONDS = 20.0


# --- what the clients do --------------------------------------------------------------------------


@dataclass
class Crowd(Mix):
    """The requests of patient clients, of those that vanish, and of those that stop reading."""

    def _whole(self, prompt: list[int], quiet: str, answer: Answer, tokens: int) -> None:
        answer.tokens = tokens
        text = self.run.complete(prompt, max_tokens=tokens, timeout=ANSWER_SECONDS)
        assert text == quiet, "another text"

    def short(self, draw: random.Random, answer: Answer) -> None:
        """20 tokens in, 24 out."""
        index = draw.randrange(len(WITNESSES))
        self._whole(WITNESSES[index], self.run.quiet[index], answer, 24)

    def long_prompt(self, draw: random.Random, answer: Answer) -> None:
        """600 to 700 tokens in, 8 out."""
        index = draw.randrange(len(self.long_prompts))
        self._whole(self.long_prompts[index], self.long_quiet[index], answer, 8)

    def streamed(self, draw: random.Random, answer: Answer) -> None:
        """20 tokens in, 24 out, streamed."""
        index = draw.randrange(len(WITNESSES))
        stream = Stream(self.run, self.run.body(WITNESSES[index], stream=True))
        with stream.connection:
            text = stream.text(answer)
        answer.tokens = 24
        assert text == self.run.quiet[index], "another text"

    def vanishes(self, draw: random.Random, answer: Answer) -> None:
        """A stream of 200 tokens that its client leaves after 0 to 4000 bytes."""
        prompt = [300 + draw.randrange(500)] * draw.choice((4, 100))
        stream = Stream(self.run, self.run.body(prompt, stream=True, max_tokens=200))
        with stream.connection:
            stream.read(draw.randrange(4000))

    def stops_reading(self, draw: random.Random, answer: Answer) -> None:
        """A stream of 300 tokens of which nothing is read for 20 s, then the rest or nothing."""
        prompt = [300 + draw.randrange(500)] * 4
        body = self.run.body(prompt, stream=True, max_tokens=300)
        stream = Stream(self.run, body, receive_buffer_bytes=2048)
        with stream.connection:
            time.sleep(UNREAD_SECONDS)
            if draw.random() < 0.5:
                stream.text(answer)


class Stream:
    """A streamed answer on a raw connection, which is read only when it is asked to."""

    def __init__(
        self, run: Served, body: dict[str, Any], receive_buffer_bytes: int | None = None
    ) -> None:
        url = httpx.URL(run.url)
        self.data = b""
        self.connection = socket.socket()
        if receive_buffer_bytes is not None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.connection.settimeout(ANSWER_SECONDS)
        content = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self.connection.connect((url.host, url.port or 80))
        self.connection.sendall(head.encode() + content)

    def read(self, count: int) -> None:
        """Read about that many bytes of the answer, or all of it."""
        while len(self.data) <= count and (part := self.connection.recv(2**16)):
            self.data += part

    def text(self, answer: Answer) -> str:
        """Read the whole answer and return its text."""
        began = time.monotonic()
        self.read(0)
        answer.first_token_seconds = time.monotonic() - began
        self.read(2**30)
        assert self.data.startswith(b"HTTP/1.1 200 "), self.data[:300]
        lines = self.data.split(b"\n")
        events = [line[6:] for line in lines if line.startswith(b"data: ")]
        assert events, self.data[:300]
        assert events[-1].strip() == b"[DONE]", events[-1]
        chunks = [json.loads(event) for event in events[:-1]]
        return "".join(choice.get("text", "") for each in chunks for choice in each["choices"])


# Kind, how many of thirty, and how.
KINDS: tuple[tuple[str, int, Ask], ...] = (
    ("short", 8, Crowd.short),
    ("streamed", 6, Crowd.streamed),
    ("long prompt", 3, Crowd.long_prompt),
    ("vanishes", 10, Crowd.vanishes),
    ("stops reading", 2, Crowd.stops_reading),
    ("malformed", 1, Mix.malformed),
)


# --- /health --------------------------------------------------------------------------------------


def _probe(host: str, port: int, orders: Connection) -> None:
    """Ask ``/health`` until an order comes, and send the seconds of each answer."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while orders.recv():
        seconds: list[float] = []
        wrong = 0
        while not orders.poll(PROBE_SECONDS):
            began = time.monotonic()
            try:
                with socket.create_connection((host, port), timeout=60) as connection:
                    connection.sendall(request)
                    answer = b""
                    while part := connection.recv(2**16):
                        answer += part
                wrong += not answer.startswith(b"HTTP/1.1 200 ")
            except OSError:
                wrong += 1
            seconds.append(time.monotonic() - began)
        orders.recv()
        orders.send((seconds, wrong))


class HealthProbe:
    """The process that asks ``/health``."""

    def __init__(self, run: Served) -> None:
        url = httpx.URL(run.url)
        spawning = multiprocessing.get_context("spawn")
        self._orders, theirs = spawning.Pipe()
        arguments = (url.host, url.port or 80, theirs)
        self._process = spawning.Process(target=_probe, args=arguments, daemon=True)
        self._process.start()

    def begin(self) -> None:
        """Begin to ask."""
        self._orders.send(True)

    def end(self) -> dict[str, Any]:
        """Stop asking; return how often, how many answers were not 200, and percentiles."""
        self._orders.send(False)
        seconds, wrong = self._orders.recv()
        ordered = sorted(seconds)
        at = {share: ordered[len(ordered) * share // 100] for share in (50, 99)}
        return {
            "asked": len(ordered), "wrong": wrong, "median": at[50], "p99": at[99],
            "longest": ordered[-1],
        }  # fmt: skip

    def close(self) -> None:
        """End the process."""
        self._orders.send(False)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


# --- the load -------------------------------------------------------------------------------------


def one_load(toy: Path, folder: Path, minutes: float, clients: int, seed: int) -> dict[str, Any]:
    """Put one run under load, and return a row of results and errors."""
    with serving(toy, "ring", "pipeline", folder, CONCURRENCY) as run:
        crowd = Crowd.of(run)
        watch = Watch.of(run.run_id)
        plan = json.loads((runs_directory() / run.run_id / "plan.json").read_text())
        files = {name: process.num_fds() for name, process in watch.processes.items()}
        probe = HealthProbe(run)
        probe.begin()
        time.sleep(IDLE_SECONDS)
        idle = probe.end()
        say(f"idle: /health p99 {idle['p99'] * 1000:.1f} ms")
        probe.begin()
        started = time.monotonic()
        until = started + minutes * 60
        with ThreadPoolExecutor(clients + 1) as pool:
            looking = pool.submit(watch.look, started)
            draws = [random.Random(f"{seed}-{number}") for number in range(clients)]
            waiting = [pool.submit(client, crowd, draw, started, until, KINDS) for draw in draws]
            try:
                while time.monotonic() < until:
                    time.sleep(0.5)
                loaded = probe.end()
                answers = [answer for each in waiting for answer in each.result()]
                time.sleep(SETTLE_SECONDS)
            finally:
                watch.over.set()
            looking.result()
        probe.close()
        after = [run.complete(prompt) for prompt in WITNESSES]
        health = httpx.get(f"{run.url}/health").status_code
        left = {name: process.num_fds() - files[name] for name, process in watch.processes.items()}
    row: dict[str, Any] = {
        "minutes": minutes, "clients": clients, "seed": seed, "requests": len(answers),
        "idle": idle, "loaded": loaded, "files_left": left, "tenths": _tenths(watch),
        "planned_bytes": {f"rank {n}": node["total_bytes"] for n, node in enumerate(plan["nodes"])},
        "kinds": _kinds(answers), "slower": loaded["p99"] / idle["p99"],
    }  # fmt: skip
    wrong = _wrong(row, answers)
    if health != 200 or after != run.quiet:
        wrong.append("afterwards, /health is not 200 or answers are others")
    return row | {"error": "; ".join(wrong)}


def _tenths(watch: Watch) -> list[dict[str, Any]]:
    """Return the most that each process held in each tenth of the time."""
    looks = [look["seen"] for look in watch.looks]
    size = max(len(looks) // SLICES, 1)
    parts = [looks[number * size : (number + 1) * size] for number in range(SLICES)]
    return [
        {name: {key: max(seen[name][key] for seen in part) for key in part[0][name]}
         for name in part[0]}
        for part in parts
        if part
    ]  # fmt: skip


def _kinds(answers: list[Answer]) -> dict[str, dict[str, Any]]:
    counted = Counter(answer.kind for answer in answers)
    return {
        name: {
            "requests": counted[name],
            "failed": sum(answer.kind == name and bool(answer.error) for answer in answers),
            "seconds": _spread([answer.seconds for answer in answers if answer.kind == name]),
        }
        for name, _, _ in KINDS
    }


def _wrong(row: dict[str, Any], answers: list[Answer]) -> list[str]:
    failed = [answer for answer in answers if answer.error]
    wrong = [f"{answer.kind} after {answer.began:.0f} s: {answer.error}" for answer in failed[:3]]
    if failed:
        wrong.insert(0, f"{len(failed)} of {len(answers)} requests")
    if row["slower"] > TIMES_SLOWER:
        wrong.append(f"/health p99 is {row['slower']:.1f} times its idle p99")
    if row["loaded"]["wrong"]:
        wrong.append(f"{row['loaded']['wrong']} answers of /health were not 200")
    first, last = row["tenths"][1], row["tenths"][-1]
    for name, held in last.items():
        growth = held["resident_bytes"] - first[name]["resident_bytes"]
        planned = row["planned_bytes"].get(name)
        # MLX keeps freed buffers up to a limit, so a rank grows within its plan, a guard never.
        if planned is not None and held["resident_bytes"] > planned:
            wrong.append(f"{name} held more than the {planned / 1e6:.0f} MB of its plan")
        if planned is None and growth > LEAST_GROWTH_BYTES:
            wrong.append(f"{name} grew by {growth / 1e6:.0f} MB")
        if row["files_left"][name] > FILES_LEFT:
            wrong.append(f"{name} kept {row['files_left'][name]} files open")
    return wrong


# --- the page -------------------------------------------------------------------------------------


def page(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the section."""
    lines = [
        *paragraph(
            f"The run has room for {CONCURRENCY} sequences; all other requests wait. A third of "
            "the requests are left in the middle of their answer, and some streams are not read. "
            "Greedy answers must be those of a quiet run, open files and the memory of guards must "
            "stay flat, a rank must stay within its plan (MLX keeps freed buffers up to a limit), "
            f"and the 99th percentile of `/health` must be at most {TIMES_SLOWER:g} times that of "
            "the idle run. `/health` is asked ten times a second, by a process of its own."
        ),
        "",
        *paragraph(measured(results, "scripts/soak clients")),
        "",
        *table(
            "kind | of 30 | what",
            ((name, share, str(ask.__doc__).rstrip(".")) for name, share, ask in KINDS),
        ),
    ]
    for row in results:
        lines += _load(row)
    return lines + write_failures(results, ("clients", "minutes"))


def _load(row: dict[str, Any]) -> list[str]:
    def milliseconds(part: dict[str, Any]) -> tuple[str, ...]:
        return tuple(f"{part[key] * 1000:.1f}" for key in ("median", "p99", "longest"))

    names = list(row["tenths"][0])
    planned = ", ".join(
        f"{name} {size / 1e6:.0f} MB" for name, size in row["planned_bytes"].items()
    )
    left = ", ".join(f"{name} {count:+d}" for name, count in row["files_left"].items())
    return [
        "",
        f"### {row['clients']} clients for {row['minutes']:g} minutes: {row['requests']} requests",
        "",
        *table(
            "`/health` | asked | not 200 | median, ms | p99, ms | longest, ms",
            (
                (name, part["asked"], part["wrong"], *milliseconds(part))
                for name, part in (("idle", row["idle"]), ("under load", row["loaded"]))
            ),
        ),
        "",
        *paragraph(
            f"The p99 of `/health` is {row['slower']:.1f} times that of the idle run. Files open "
            f"afterwards, beyond those before: {left}. Planned: {planned}."
        ),
        "",
        *table(
            f"tenth | {' | '.join(f'{name}: MB, files' for name in names)}",
            (
                (number, *(f"{part[name]['resident_bytes'] / 1e6:.0f}, {part[name]['files']}"
                           for name in names))
                for number, part in enumerate(row["tenths"], start=1)
            ),
        ),
        "",
        *table(
            "kind | requests | not as expected | seconds: median, p95, longest",
            (
                (name, kind["requests"], kind["failed"],
                 ", ".join(f"{seconds:.1f}" for seconds in kind["seconds"]))
                for name, kind in row["kinds"].items()
            ),
        ),
    ]  # fmt: skip


def main() -> int:
    """Run the load and write the section; 1 if anything was wrong."""
    parser = parser_of("clients", __doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begin(options)
    with workplace() as (folder, toy):
        row = one_load(toy, folder, options.minutes, options.clients, options.seed)
    note(options, row)
    say(f"{row['requests']} requests: {row['error'] or 'as expected'}")
    results = results_of(options)
    write_section(options.docs, TITLE, page(results))
    return 1 if row["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
