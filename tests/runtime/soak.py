"""Every fault on every placement and back end, in rounds: ``python -m tests.runtime.soak``.

Results are appended to a file, so that a long soak can be run in slices; the table is made of all
of them. What is written is what was measured, failures included.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.runtime.faults import FATAL, FAULTS, HARMLESS, Fault, serving

COMBINATIONS = tuple(itertools.product(("pipeline", "tensor"), ("mpi", "ring")))


def _outcome(fault: Fault, work: Any) -> dict[str, Any]:
    started = time.monotonic()
    try:
        seconds = work()
        error = ""
    except Exception as failure:  # a row of the table, not the end of the soak
        seconds, error = None, f"{type(failure).__name__}: {failure}"[:500]
    return {"fault": fault.name, "error": error, "end_seconds": seconds,
            "took_seconds": time.monotonic() - started}  # fmt: skip


def one_round(toy: Path, strategy: str, backend: str, folder: Path) -> Iterator[dict[str, Any]]:
    """All faults on one placement and back end: one run for the harmless, one for each other."""
    left = list(HARMLESS)
    while left:
        # A run that a fault broke is replaced by another for what is left.
        try:
            with serving(toy, backend, strategy, folder) as run:
                while left:
                    fault = left.pop(0)
                    outcome = _outcome(fault, lambda f=fault: run.undisturbed_by(f.do))
                    yield outcome
                    if outcome["error"]:
                        break
        except Exception as failure:
            if not left:
                break
            yield {"fault": left.pop(0).name, "error": f"no run: {failure}"[:500]}
    for fault in FATAL:

        def work(fault: Fault = fault) -> float:
            with serving(toy, backend, strategy, folder) as run:
                return run.ended_by(fault.do, fault.cause)

        yield _outcome(fault, work)


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    dates = sorted({result["date"] for result in results})
    machines = sorted({result["machine"] for result in results})
    failures = sum(bool(result["error"]) for result in results)
    lines = [
        "# What faults do to other requests",
        "",
        "Two ranks of a toy of Kimi K2 (float32) on one machine, started by `k2 launch` and spoken",
        "to over HTTP. While a fault happens, three other clients ask for greedy answers, over and",
        "over. They must get the very text of a quiet run; or the run must end everywhere, with an",
        "error that names the cause, to clients and in `k2 ps`. “Seconds” is from the fault until",
        "no process of the run was left: the median and the longest.",
        "",
        f"Written by `scripts/soak runtime`; measured on {', '.join(dates)}.",
        f"Machine: {'; '.join(machines)}.",
        f"{len(results)} faults in all, {failures} not as expected.",
        "",
        "| fault | how | expected |",
        "| --- | --- | --- |",
        *(f"| {fault.name} | {fault.how} | {fault.expected} |" for fault in FAULTS),
        "",
        "| fault | placement | back end | rounds | as expected | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault, (strategy, backend) in itertools.product(FAULTS, COMBINATIONS):
        rows = [
            result
            for result in results
            if (result["fault"], result["strategy"], result["backend"])
            == (fault.name, strategy, backend)
        ]
        if not rows:
            continue
        good = sum(not result["error"] for result in rows)
        ends = [row["end_seconds"] for row in rows if row.get("end_seconds") is not None]
        seconds = f"{statistics.median(ends):.1f}, {max(ends):.1f}" if ends else ""
        lines.append(
            f"| {fault.name} | {strategy} | {backend} | {len(rows)} | {good} | {seconds} |"
        )
    errors = [result for result in results if result["error"]]
    if errors:
        lines += ["", "Not as expected:", ""]
        for row in errors:
            error = " ".join(row["error"].split())
            lines.append(f"* {row['fault']}, {row['strategy']}, {row['backend']}: {error}")
    return "\n".join(lines) + "\n"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, {memory / 2**30:.0f} GiB"


def main() -> int:
    """Run what is asked for and write the table; 1 if anything was not as expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["-".join(entry) for entry in COMBINATIONS])
    parser.add_argument("--results", type=Path, default=Path(".k2/soak/runtime.jsonl"))
    parser.add_argument("--resume", action="store_true", help="add to earlier results")
    parser.add_argument("--docs", type=Path, default=Path("docs/soak.md"))
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        options.results.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="k2-soak-") as temporary:
        folder = Path(temporary)
        for kind in ("config", "state", "data"):
            os.environ[f"K2_{kind.upper()}_DIR"] = str(folder / kind)
        from k2cli.models.toy import build_toy_k2

        build_toy_k2(folder / "toy-k2")
        for number, (strategy, backend) in itertools.product(range(options.rounds), COMBINATIONS):
            if options.only not in (None, f"{strategy}-{backend}"):
                continue
            for outcome in one_round(folder / "toy-k2", strategy, backend, folder):
                row = outcome | {
                    "strategy": strategy, "backend": backend, "machine": _machine(),
                    "date": datetime.date.today().isoformat(),
                }  # fmt: skip
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                verdict = row["error"] or "as expected"
                sys.stderr.write(
                    f"round {number + 1}, {strategy}, {backend}: {row['fault']}: {verdict}\n"
                )
    results = [json.loads(line) for line in options.results.read_text().splitlines()]
    options.docs.write_text(table(results))
    return 1 if any(result["error"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
