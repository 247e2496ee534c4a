"""Mixed requests for a long time, with answers, latency and memory watched: ``scripts/soak loads``.

Clients ask one thing after another, drawn by seed from a mix: short and long prompts, long answers,
conversations that reuse their prefix, clients that walk away, malformed bodies. Greedy answers must
be those of a quiet run whatever else is being computed. Meanwhile a look a second at each process
of the run tells whether its memory, files or threads grow, and whether a rank stays within its
plan. Rows of the table are tenths of the time, so that a slow change would show.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from k2cli.settings import runs_directory
from tests.soak.mix import KINDS, Answer, Mix, client
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
from tests.support.faults import CONTEXT, k2, serving

TITLE = "Long loads"
SLICES = 10
COMBINATIONS = (("pipeline", "mpi"), ("tensor", "mpi"), ("pipeline", "ring"), ("tensor", "ring"))


# --- what the processes are -----------------------------------------------------------------------


@dataclass
class Watch:
    """Sampler of the processes of a run, once a second, from outside."""

    processes: dict[str, psutil.Process]
    looks: list[dict[str, Any]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, run_id: str) -> Watch:
        """Find ranks and guards by name."""
        (run,) = [run for run in k2("ps")["runs"] if run["run_id"] == run_id]
        return cls({
            f"{kind} {rank['rank']}": psutil.Process(rank[f"{kind}_pid"])
            for rank in run["ranks"]
            for kind in ("rank", "guard")
        })  # fmt: skip

    def look(self, started: float) -> None:
        """Take a sample each second until ``over`` is set."""
        while not self.over.wait(1.0):
            seen = {
                name: {
                    "resident_bytes": process.memory_info().rss,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                }
                for name, process in self.processes.items()
            }
            self.looks.append({"seconds": time.monotonic() - started, "seen": seen})


def one_load(
    toy: Path, strategy: str, backend: str, folder: Path, minutes: float, clients: int, seed: int
) -> dict[str, Any]:
    """Put one run under load, and return a row of results and errors."""
    with serving(toy, backend, strategy, folder) as run:
        mix = Mix.of(run)
        watch = Watch.of(run.run_id)
        plan = json.loads((runs_directory() / run.run_id / "plan.json").read_text())
        started = time.monotonic()
        until = started + minutes * 60
        with ThreadPoolExecutor(clients + 1) as pool:
            looking = pool.submit(watch.look, started)
            draws = [random.Random(f"{seed}-{number}") for number in range(clients)]
            waiting = [pool.submit(client, mix, draw, started, until) for draw in draws]
            try:
                answers = [answer for each in waiting for answer in each.result()]
            finally:
                watch.over.set()
            looking.result()
        health = httpx.get(f"{run.url}/health").status_code
    planned = {f"rank {rank}": node["total_bytes"] for rank, node in enumerate(plan["nodes"])}
    slices = _slices(answers, watch.looks, minutes * 60)
    return {
        "strategy": strategy, "backend": backend, "minutes": minutes, "clients": clients,
        "seed": seed, "planned_bytes": planned, "slices": slices, "kinds": _kinds(answers),
        "requests": len(answers), "error": _wrong(answers, health, slices, planned),
    }  # fmt: skip


def _wrong(
    answers: list[Answer], health: int, slices: list[dict[str, Any]], planned: dict[str, int]
) -> str:
    """Describe what was wrong: an answer, the health, or a rank's memory beyond its plan."""
    failed = [answer for answer in answers if answer.error]
    said = [f"{answer.kind} after {answer.began:.0f} s: {answer.error}" for answer in failed[:3]]
    if failed:
        said.insert(0, f"{len(failed)} of {len(answers)} requests:")
    if health != 200:
        said.append(f"/health answered {health} after the load")
    for name, limit in planned.items():
        most = max(part["processes"][name]["resident_bytes"] for part in slices)
        if most > limit:
            said.append(f"{name} held {_mb(most)} MB, planned were {_mb(limit)}")
    return "; ".join(said)


def _slices(
    answers: list[Answer], looks: list[dict[str, Any]], seconds: float
) -> list[dict[str, Any]]:
    """Return, for each tenth of the time, the requests and the peak use of each process."""
    parts = []
    for number in range(SLICES):
        begin_at, end_at = (seconds * (number + edge) / SLICES for edge in (0, 1))
        # Samples after the end of the time belong to the last tenth.
        last = number == SLICES - 1
        seen = [
            look["seen"]
            for look in looks
            if begin_at <= look["seconds"] and (last or look["seconds"] < end_at)
        ]
        asked = [answer for answer in answers if begin_at <= answer.began < end_at]
        parts.append(
            {
                "requests": len(asked),
                "tokens_per_second": sum(answer.tokens for answer in asked) / (seconds / SLICES),
                "short_seconds": _spread([a.seconds for a in asked if a.kind == "short"]),
                "processes": {
                    name: {key: max(look[name][key] for look in seen) for key in seen[0][name]}
                    for name in seen[0]
                },
            }
        )
    return parts


def _kinds(answers: list[Answer]) -> dict[str, dict[str, Any]]:
    by_kind: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_kind[answer.kind].append(answer)
    return {
        name: {
            "requests": len(by_kind[name]),
            "failed": [asdict(answer) for answer in by_kind[name] if answer.error],
            "seconds": _spread([answer.seconds for answer in by_kind[name]]),
            "first_token_seconds": _spread(
                [a.first_token_seconds for a in by_kind[name] if a.first_token_seconds is not None]
            ),
        }
        for name, _, _ in KINDS
    }


def _spread(values: Sequence[float]) -> list[float]:
    """Return median, 95th percentile (nearest rank) and longest; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return []
    return [ordered[min(len(ordered) * share // 100, len(ordered) - 1)] for share in (50, 95, 100)]


# --- the page -------------------------------------------------------------------------------------


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def _times(spread: Sequence[float]) -> str:
    return ", ".join(f"{seconds:.2f}" for seconds in spread)


def page(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the section."""
    requests = sum(row["requests"] for row in results)
    failed = sum(len(kind["failed"]) for row in results for kind in row["kinds"].values())
    lines = [
        *paragraph(
            "Clients draw what they ask, by seed, from a mix; the run has room for 4 "
            f"sequences of {CONTEXT} tokens. Greedy answers must be those of a quiet run, a "
            "rank must stay within its plan, and `/health` must be 200 at the end. Times are "
            "median, 95th percentile and longest, in seconds; memory is the most that was "
            "resident in that tenth of the time, in MB."
        ),
        "",
        *paragraph(
            f"{measured(results, 'scripts/soak loads')} {requests} requests in all, {failed} not "
            "as expected."
        ),
        "",
        *table(
            "kind | of 20 | what",
            ((name, share, str(ask.__doc__).rstrip(".")) for name, share, ask in KINDS),
        ),
    ]
    for row in results:
        lines += _load(row)
    return lines + write_failures(results, ("strategy", "backend"))


def _load(row: dict[str, Any]) -> list[str]:
    names = list(row["slices"][0]["processes"])
    first, last = (row["slices"][index]["processes"] for index in (1, -1))
    grown = [
        f"{name} {(last[name]['resident_bytes'] - first[name]['resident_bytes']) / 1e6:+.1f} MB, "
        f"{last[name]['files'] - first[name]['files']:+d} files, "
        f"{last[name]['threads'] - first[name]['threads']:+d} threads"
        for name in names
    ]
    planned = ", ".join(f"{name} {_mb(size)} MB" for name, size in row["planned_bytes"].items())
    return [
        "",
        f"### {row['strategy']}, {row['backend']}: {row['clients']} clients for"
        f" {row['minutes']:g} minutes",
        "",
        *paragraph(
            f"Planned: {planned}. From the second tenth to the last: {'; '.join(grown)}."
        ),
        "",
        *table(
            f"tenth | requests | tokens/s | short | {' | '.join(names)}",
            (
                (
                    number + 1, part["requests"], f"{part['tokens_per_second']:.1f}",
                    _times(part["short_seconds"]),
                    *(_mb(part["processes"][name]["resident_bytes"]) for name in names),
                )
                for number, part in enumerate(row["slices"])
            ),
        ),
        "",
        *table(
            "kind | requests | not as expected | seconds | to the first token",
            (
                (
                    name, kind["requests"], len(kind["failed"]), _times(kind["seconds"]),
                    _times(kind["first_token_seconds"]),
                )
                for name, kind in row["kinds"].items()
            ),
        ),
    ]  # fmt: skip


def main() -> int:
    """Run the loads that are asked for and write the section; 1 if anything was wrong."""
    parser = parser_of("loads", __doc__)
    parser.add_argument("--minutes", type=float, default=30, help="for each load")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    names = ["-".join(entry) for entry in COMBINATIONS]
    parser.add_argument("--only", nargs="*", choices=names, default=names[:2])
    options = parser.parse_args()
    begin(options)
    with workplace() as (folder, toy):
        for (strategy, backend), name in zip(COMBINATIONS, names, strict=True):
            if name not in options.only:
                continue
            row = one_load(
                toy, strategy, backend, folder, options.minutes, options.clients, options.seed
            )
            note(options, row)
            say(f"{name}: {row['requests']} requests: {row['error'] or 'as expected'}")
    results = results_of(options)
    write_section(options.docs, TITLE, page(results))
    return 1 if any(result["error"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
