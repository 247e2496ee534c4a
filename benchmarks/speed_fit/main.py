"""The command ``scripts/fit-speed-model``: fit, write the constants and the page, report."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.speed_fit.document import constants_toml, document
from benchmarks.speed_fit.evaluate import summarise
from benchmarks.speed_fit.outcome import run_fit
from k2cli.planning.speed.constants import CONSTANTS_FILE

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "design" / "speed-model.md"


def run(arguments: Sequence[str] | None = None) -> int:
    """Fit; 1 if ``--check`` finds files that are not what the fit gives, or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    outcome = run_fit()
    held = summarise(outcome.held_out)
    sys.stderr.write(
        f"{held.count} figures held out: {held.inside:.0%} inside their band, median error "
        f"{held.median_error:.1%}, widest band {held.widest:.2f}\n"
    )
    current = _read(CONSTANTS_FILE)
    written = re.search(r'^fitted_on = "([\d-]+)"$', current, re.MULTILINE)
    date = written.group(1) if written else ""
    if constants_toml(outcome, date) != current and not options.check:
        date = datetime.now(UTC).date().isoformat()
    wanted = {CONSTANTS_FILE: constants_toml(outcome, date), DOCUMENT: document(outcome)}
    stale = [path for path, text in wanted.items() if _read(path) != text]
    for path in stale:
        if options.check:
            sys.stderr.write(f"{path.name} is not what the fit gives\n")
        else:
            path.write_text(wanted[path], encoding="utf-8")
    met = held.inside >= 0.8 and held.median_error <= 0.3 and held.widest <= 2.0001
    return 0 if met and not (options.check and stale) else 1


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
