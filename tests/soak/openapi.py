"""Requests drawn from the OpenAPI document against a real run: ``scripts/soak openapi``.

schemathesis reads the document of a run of the toy on one rank, and sends requests that it allows
and that it does not. No answer may be a 500, none may take longer than a minute, each must have a
status and a form of the document, and what the document forbids must be refused.
"""

from __future__ import annotations

import sys
import time
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
    write_section,
)
from tests.support.faults import k2
from tests.support.schemathesis_run import fuzz

TITLE = "Requests drawn from the OpenAPI document"
PHASES = ("coverage", "fuzzing")


def one_load(
    toy: Path, folder: Path, phase: str, examples: int, minutes: float, seed: int
) -> dict[str, Any]:
    """Start a run, send the requests of one phase, and return the row of the page."""
    run = k2("launch", str(toy), "--context", "256", "--detach")
    try:
        started = time.monotonic()
        found = fuzz(
            run["url"], folder, phases=phase, examples=examples, seconds=int(minutes * 60),
            seed=seed, workers=2,
        )  # fmt: skip
        seconds = time.monotonic() - started
    finally:
        k2("stop", run["run_id"])
    if found.status:
        say(found.report)
    return {
        "phase": phase, "seed": seed, "requests": found.cases, "minutes": seconds / 60,
        "error": found.status,
    }  # fmt: skip


def page(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the section."""
    return [
        *paragraph(
            "schemathesis draws requests from the OpenAPI document, allowed ones and others, "
            "and sends them to one rank. No answer may be a 500 or take longer than a minute; each "
            "must have a status and a form of the document, and what it forbids must be refused."
        ),
        "",
        *paragraph(measured(results, "scripts/soak openapi")),
        "",
        *table(
            "phase | seed | requests | minutes | result",
            (
                (
                    row["phase"], row["seed"], row["requests"], f"{row['minutes']:.1f}",
                    "failures" if row["error"] else "as documented",
                )
                for row in results
            ),
        ),
    ]  # fmt: skip


def main() -> int:
    """Send what is asked for and write the section; 1 if anything was wrong."""
    parser = parser_of("openapi", __doc__)
    parser.add_argument("--examples", type=int, default=200, help="for each route and phase")
    parser.add_argument("--minutes", type=float, default=10, help="the most for each phase")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begin(options)
    rows = []
    with workplace() as (folder, toy):
        for phase in PHASES:
            row = one_load(toy, folder, phase, options.examples, options.minutes, options.seed)
            say(f"{phase}: {row['requests']} requests, status {row['error']}")
            note(options, row)
            rows.append(row)
    write_section(options.docs, TITLE, page(results_of(options)))
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
