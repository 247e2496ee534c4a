"""Waiting in the queue: one-token requests beside 64 clients, and three keys with different limits.

``python -m benchmarks.fairness --before FOLDER`` measures a run of two ranks on this machine and
writes docs/measurements/fairness.md. FOLDER has the code of an earlier commit (``git archive``),
with which the first measurement is done too. The model is the small toy of the benchmarks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.checkpoints import SMALL_TOY, make_toy, word_prompt
from benchmarks.comparison import say
from benchmarks.report import environment
from tests.support.rank_pool import free_ports

_ROOT = Path(__file__).resolve().parents[1]
_PAGE = _ROOT / "docs/measurements/fairness.md"
CLIENTS, CONCURRENCY, CONTEXT = 64, 8, 2048
PROMPT_TOKENS, ANSWER_TOKENS = 40, 32
PROBE_TOKENS = 20
_START_SECONDS = 180.0
_ANSWER_SECONDS = 600.0

_PAGE_TEXT = """\
# Waiting in the queue

`python -m benchmarks.fairness` measures this and writes this page. **CPU toy**: the model is the
small toy of the benchmarks on two ranks (a pipeline over a ring, `--concurrency {concurrency}
--context {context}`) of one machine, so the seconds say nothing about a Mac; compare the columns.

{machine}.
{versions}. Load average at the end: {load}; other work used the cores too.

## One-token requests beside {clients} clients

{clients} clients of one key ask all the time, for {before_seconds:.0f} s (before) and
{seconds:.0f} s (after): prompts of {prompt} tokens, a limit of a whole context (so that
{concurrency} of them fit at a time), and they leave after {answer} tokens. Beside them, two clients
of the same key and two of another ask for one token after {probe} tokens, one request after
another. *Before* is the commit before the fair queue (first come, first served), *after* the one
with it. Seconds to the whole answer:

| one token for | before: number, median, longest | after: number, median, longest |
| --- | --- | --- |
{crowd}

The {clients} clients' own answers: {rates}.

## Three keys with different limits

For {keys_seconds:.0f} s, each key has {key_clients} clients like those above: prompts of
{key_prompt} tokens, a limit of a whole context, and they leave after {key_answer} tokens. `slow`
has no limits, and reads one piece of its streams every half second, so that its requests run for
long. `metered` has `--tokens-per-minute {per_minute}` and asks for more: its clients wait as long
as `Retry-After` says. `revoked` has `--max-concurrent 2`, and is revoked after
{revoked_at:.0f} s. Seconds to the first token, as the clients see them; *waiting* is the mean and
the most of `k2_key_requests_waiting`, read once a second:

| key | answers | median | longest | 429 | 401 | broken off | waiting: mean, most |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
{keys}

Median of `slow` and `metered` before the revocation: {before_revoked:.1f} s to the first token,
after it: {after_revoked:.1f} s. Running requests were paused {pauses} times.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of two ranks, its named keys, and the code that it runs."""

    code: Path
    folder: Path
    url: str
    run_key: str

    def k2(self, *arguments: str) -> str:
        """Run a command of the run's own code."""
        return _k2(self.code, self.folder, *arguments)

    def make_key(self, name: str, *limits: str) -> str:
        """Make a named key; the run accepts it within five seconds."""
        return self.k2("keys", "create", name, *limits).strip()


def _k2(code: Path, folder: Path, *arguments: str) -> str:
    names = {"K2_CONFIG_DIR": str(folder / "config"), "K2_STATE_DIR": str(folder / "state")}
    others = {name: value for name, value in os.environ.items() if not name.startswith("K2_")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "k2cli", *arguments],
        env=others | names | {"PYTHONPATH": str(code), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
    )
    if done.returncode != 0:
        raise RuntimeError(f"k2 {arguments[0]} ended with {done.returncode}: {done.stderr}")
    return done.stdout


@contextmanager
def running(code: Path, model: Path) -> Iterator[Run]:
    """Launch a run that accepts named keys, and stop it."""
    with tempfile.TemporaryDirectory(prefix="k2-fair-") as name:
        folder = Path(name)
        (port,) = free_ports(1)
        options = {
            "--nodes": "localhost,localhost", "--backend": "ring", "--parallel": "pipeline",
            "--context": str(CONTEXT), "--concurrency": str(CONCURRENCY), "--port": str(port),
            "--keys": "all", "--api-key": "k2-benchmark-of-fairness",
        }  # fmt: skip
        words = [word for option in options.items() for word in option]
        _k2(code, folder, "keys", "create", "unused")
        try:
            _k2(code, folder, "launch", str(model), *words, "--detach", "--json")
            yield Run(code, folder, f"http://127.0.0.1:{port}", options["--api-key"])
        finally:
            _k2(code, folder, "stop", "--all")


@dataclass(slots=True)
class Seen:
    """What the clients of one key saw. ``firsts`` are (moment, seconds to the first token)."""

    firsts: list[tuple[float, float]] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    tokens: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    broken: int = 0
    waiting: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Asking:
    """What a client asks for, and how slowly it reads."""

    key: str
    prompt_tokens: int
    answer_tokens: int
    pause_seconds: float = 0.0
    read_seconds: float = 0.0
    leave_after: int = 0


@asynccontextmanager
async def _http(run: Run) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=run.url, timeout=_ANSWER_SECONDS, limits=limits, trust_env=False
    ) as client:
        yield client


async def _ask(client: httpx.AsyncClient, asking: Asking, seed: int, seen: Seen) -> float:
    """Ask once; return the seconds that the server asks to wait, or 0."""
    body = {
        "model": "toy", "prompt": word_prompt(asking.prompt_tokens, seed), "stream": True,
        "max_tokens": asking.answer_tokens, "temperature": 0, "k2": {"ignore_stop_tokens": True},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {asking.key}"}
    began, first = time.monotonic(), None
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        seen.statuses[response.status_code] = seen.statuses.get(response.status_code, 0) + 1
        if response.status_code != 200:
            await response.aread()
            return float(response.headers.get("retry-after", 5))
        whole, pieces = False, 0
        async for line in response.aiter_lines():
            whole = whole or line == "data: [DONE]"
            if line.startswith("data: {") and '"error"' in line:
                break
            if line.startswith("data: {") and first is None:
                first = time.monotonic() - began
                seen.firsts.append((time.monotonic(), first))
            pieces += line.startswith("data: {")
            if asking.leave_after and pieces >= asking.leave_after:
                whole = True
                break
            if asking.read_seconds and line.startswith("data: {"):
                await asyncio.sleep(asking.read_seconds)
    if whole:
        seen.wholes.append(time.monotonic() - began)
        seen.tokens += asking.leave_after or asking.answer_tokens
    else:
        seen.broken += 1
    return 0.0


async def _client(
    client: httpx.AsyncClient, asking: Asking, seeds: Iterator[int], seen: Seen, until: float
) -> None:
    """Ask one request after another."""
    while time.monotonic() < until:
        try:
            wait = await _ask(client, asking, next(seeds), seen)
        except httpx.HTTPError:
            seen.broken += 1
            wait = 1.0
        await asyncio.sleep(min(wait + asking.pause_seconds, max(0.0, until - time.monotonic())))


async def _together(seconds: float, clients: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run the clients for so long; requests under way then are given up."""
    tasks = [asyncio.create_task(client) for client in clients]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _seeds() -> Iterator[int]:
    draw = random.Random(19)
    while True:
        yield draw.randrange(2**31)


# --- 64 clients ----------------------------------------------------------------------------------


async def _beside_a_crowd(run: Run, seconds: float) -> dict[str, Any]:
    crowd_key, other_key = run.make_key("crowd"), run.make_key("other")
    await asyncio.sleep(6)
    crowd, same, other, seeds = Seen(), Seen(), Seen(), _seeds()
    until = time.monotonic() + seconds
    asking = Asking(crowd_key, PROMPT_TOKENS, CONTEXT - PROMPT_TOKENS, leave_after=ANSWER_TOKENS)
    probes = [
        (Asking(key, PROBE_TOKENS, 1, pause_seconds=1.0), seen)
        for key, seen in ((crowd_key, same), (other_key, other))
        for _ in range(2)
    ]
    async with _http(run) as client:
        clients = [_client(client, asking, seeds, crowd, until) for _ in range(CLIENTS)]
        clients += [_late(client, probe, seeds, seen, until) for probe, seen in probes]
        await _together(seconds, clients)
        metrics = await _metrics(client, run)
    return {
        "seconds": seconds, "same": same.wholes, "other": other.wholes,
        "rate": crowd.tokens / seconds, "answers": len(crowd.wholes),
        "pauses": metrics.get(("k2_key_pauses_total", "crowd"), 0.0),
    }  # fmt: skip


async def _late(
    client: httpx.AsyncClient, asking: Asking, seeds: Iterator[int], seen: Seen, until: float
) -> None:
    await asyncio.sleep(5)  # the crowd is there first
    await _client(client, asking, seeds, seen, until)


async def _metrics(client: httpx.AsyncClient, run: Run) -> dict[tuple[str, str], float]:
    """Return the metrics with a label ``key`` and no other."""
    response = await client.get("/metrics", headers={"Authorization": f"Bearer {run.run_key}"})
    found = {}
    for line in response.text.splitlines():
        name, _, rest = line.partition('{key="')
        key, _, value = rest.partition('"} ')
        if value:
            found[name, key] = float(value)
    return found


# --- three keys ----------------------------------------------------------------------------------

KEY_CLIENTS, KEY_PROMPT, KEY_ANSWER, PER_MINUTE = 12, 40, 32, 1500


async def _three_keys(run: Run, seconds: float) -> dict[str, Any]:
    keys = {
        "slow": run.make_key("slow"),
        "metered": run.make_key("metered", "--tokens-per-minute", str(PER_MINUTE)),
        "revoked": run.make_key("revoked", "--max-concurrent", "2"),
    }
    await asyncio.sleep(6)
    seen, seeds = {name: Seen() for name in keys}, _seeds()
    began = time.monotonic()
    until = began + seconds

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            found = await _metrics(client, run)
            for name, entry in seen.items():
                entry.waiting.append(found.get(("k2_key_requests_waiting", name), 0.0))
            await asyncio.sleep(1)

    async def revoke() -> None:
        await asyncio.sleep(seconds / 2)
        await asyncio.to_thread(run.k2, "keys", "revoke", "revoked")

    async with _http(run) as client:
        clients = [
            _client(
                client,
                Asking(
                    key,
                    KEY_PROMPT,
                    CONTEXT - KEY_PROMPT,
                    read_seconds=0.5 if name == "slow" else 0.0,
                    leave_after=KEY_ANSWER,
                ),
                seeds,
                seen[name],
                until,
            )
            for name, key in keys.items()
            for _ in range(KEY_CLIENTS)
        ]
        await _together(seconds, [*clients, watch(client), revoke()])
        metrics = await _metrics(client, run)
    pauses = sum(value for (name, _), value in metrics.items() if name == "k2_key_pauses_total")
    return {
        "seconds": seconds,
        "began": began,
        "pauses": pauses,
        "keys": {name: asdict(entry) for name, entry in seen.items()},
    }


# --- the page ------------------------------------------------------------------------------------


def _three(seconds: Sequence[float]) -> str:
    if not seconds:
        return "0, none came to its end"
    return f"{len(seconds)}, {statistics.median(seconds):.2f}, {max(seconds):.2f}"


def _key_row(name: str, entry: dict[str, Any]) -> str:
    firsts = [seconds for _, seconds in entry["firsts"]]
    statuses = {int(status): count for status, count in entry["statuses"].items()}
    waiting = entry["waiting"]
    cells = [
        f"`{name}`", str(len(entry["wholes"])), f"{statistics.median(firsts):.2f}",
        f"{max(firsts):.2f}", str(statuses.get(429, 0)), str(statuses.get(401, 0)),
        str(entry["broken"]), f"{statistics.mean(waiting):.1f}, {max(waiting):.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page(found: dict[str, Any]) -> str:
    """Return the page of results."""
    machine = environment()
    before, after, keys = found["before"], found["after"], found["keys"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    middle = keys["began"] + keys["seconds"] / 2
    firsts = [tuple(pair) for name in ("slow", "metered") for pair in keys["keys"][name]["firsts"]]
    return _PAGE_TEXT.format(
        concurrency=CONCURRENCY, context=CONTEXT, clients=CLIENTS, answer=ANSWER_TOKENS,
        prompt=PROMPT_TOKENS, probe=PROBE_TOKENS, seconds=after["seconds"],
        before_seconds=before["seconds"],
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        versions=f"Python {machine['python']}, {versions}",
        load=f"{machine['load_average'][0]:.1f}",
        crowd="\n".join(
            f"| {text} | {_three(before[name])} | {_three(after[name])} |"
            for name, text in (("same", "the same key"), ("other", "another key"))
        ),
        rates=(
            f"before {before['answers']} ({before['rate']:.0f} tokens per second), "
            f"after {after['answers']} ({after['rate']:.0f}), with {after['pauses']:.0f} pauses"
        ),
        keys_seconds=keys["seconds"], key_clients=KEY_CLIENTS, key_answer=KEY_ANSWER,
        key_prompt=KEY_PROMPT, per_minute=PER_MINUTE, revoked_at=keys["seconds"] / 2,
        keys="\n".join(_key_row(name, entry) for name, entry in keys["keys"].items()),
        before_revoked=statistics.median(s for at, s in firsts if at < middle),
        after_revoked=statistics.median(s for at, s in firsts if at >= middle),
        pauses=f"{keys['pauses']:.0f}",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, keep the results, and write the page once all are there."""
    parser = argparse.ArgumentParser(prog="benchmarks.fairness", description=__doc__)
    parser.add_argument("--before", type=Path, help="folder with the code of an earlier commit")
    parser.add_argument("--seconds", type=float, default=150.0, help="of each measurement")
    parser.add_argument("--results", type=Path, default=Path("fairness.json"))
    parser.add_argument("--models", type=Path, required=True, help="folder that keeps the model")
    parser.add_argument("--only", choices=["before", "after", "keys"], action="append")
    parser.add_argument("--page", type=Path, default=_PAGE)
    options = parser.parse_args(arguments)
    model = make_toy(options.models / "toy", SMALL_TOY)
    found = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for part in options.only or ["before", "after", "keys"]:
        code = options.before if part == "before" else _ROOT
        if code is None:
            parser.error("--before is needed")
        with running(code, model) as run:
            measure = _three_keys if part == "keys" else _beside_a_crowd
            found[part] = asyncio.run(measure(run, options.seconds))
        options.results.write_text(json.dumps(found))
        say(f"{part}: done")
    if {"before", "after", "keys"} <= found.keys():
        options.page.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
