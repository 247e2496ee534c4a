"""Every fault on every placement and transport, in rounds: ``scripts/soak runtime``.

The page has everything that was measured, failures included.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from tests.support.faults import FATAL, FAULTS, HARMLESS, Fault, serving

TITLE = "What faults do to other requests"
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
    """Raise all faults on one placement and transport: harmless ones in one run, others alone."""
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


def page(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the section."""
    failures = sum(bool(result["error"]) for result in results)
    lines = [
        *paragraph(
            "During each fault, three other clients ask for greedy answers again and again. "
            "Either they must get exactly the text of an undisturbed run, or the run must end on "
            "all ranks, and clients and `k2 ps` must be told the cause. “Seconds” is the time "
            "from the fault until no process of the run was left: the median and the longest."
        ),
        "",
        *paragraph(
            f"{measured(results, 'scripts/soak runtime')} {len(results)} faults in all, {failures} "
            "not as expected."
        ),
        "",
        *table("fault | how | expected", ((f.name, f.how, f.expected) for f in FAULTS)),
        "",
        *table("fault | placement | transport | rounds | as expected | seconds", _rows(results)),
    ]
    return lines + write_failures(results, ("fault", "strategy", "backend"))


def _rows(results: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    for fault, (strategy, backend) in itertools.product(FAULTS, COMBINATIONS):
        wanted = (fault.name, strategy, backend)
        rows = [row for row in results if (row["fault"], row["strategy"], row["backend"]) == wanted]
        if not rows:
            continue
        good = sum(not row["error"] for row in rows)
        ends = [row["end_seconds"] for row in rows if row.get("end_seconds") is not None]
        seconds = f"{statistics.median(ends):.1f}, {max(ends):.1f}" if ends else ""
        yield (*wanted, len(rows), good, seconds)


def main() -> int:
    """Run the chosen rounds and write the section; 1 if anything was not as expected."""
    parser = parser_of("runtime", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["-".join(entry) for entry in COMBINATIONS])
    options = parser.parse_args()
    begin(options)
    with workplace() as (folder, toy):
        for number, (strategy, backend) in itertools.product(range(options.rounds), COMBINATIONS):
            if options.only not in (None, f"{strategy}-{backend}"):
                continue
            for outcome in one_round(toy, strategy, backend, folder):
                note(options, outcome | {"strategy": strategy, "backend": backend})
                verdict = outcome["error"] or "as expected"
                say(f"round {number + 1}, {strategy}, {backend}: {outcome['fault']}: {verdict}")
    results = results_of(options)
    write_section(options.docs, TITLE, page(results))
    return 1 if any(result["error"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
