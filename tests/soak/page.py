"""Write what soaks measured: a file of JSON lines each, and a part of docs/measurements/soak.md.

A file of results outlives an interrupted soak, and the page is always made of the whole file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_HEAD = """\
# Long runs

This page shows what `scripts/soak` measured: two real ranks of a toy of Kimi K2 (float32, MLX's CPU
device) on one machine, started by `k2 launch` and used over HTTP. Times are valid for that
machine and for what else ran on it. That no process is left, and that answers are correct, does not
depend on the machine.
"""


@contextmanager
def workplace() -> Iterator[tuple[Path, Path]]:
    """Make a folder for all of k2's state during this soak, and a toy of Kimi K2 in it."""
    from lab.toy_k2.checkpoint import build_toy_k2

    with tempfile.TemporaryDirectory(prefix="k2-soak-") as temporary:
        folder = Path(temporary)
        for kind in ("config", "state", "data"):
            os.environ[f"K2_{kind.upper()}_DIR"] = str(folder / kind)
        build_toy_k2(folder / "toy-k2")
        yield folder, folder / "toy-k2"


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all soaks have."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/soak {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results = ROOT / ".k2" / "soak" / f"{name}.jsonl"
    parser.add_argument("--results", type=Path, default=results, help="%(default)s")
    parser.add_argument("--resume", action="store_true", help="add to earlier results")
    parser.add_argument(
        "--beside", default="nothing else", help="other load on the machine, for the page"
    )
    page = ROOT / "docs" / "measurements" / "soak.md"
    parser.add_argument("--docs", type=Path, default=page, help="%(default)s")
    return parser


def begin(options: argparse.Namespace) -> None:
    """Prepare the file of results; earlier results are removed unless ``--resume`` is given."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        options.results.unlink(missing_ok=True)


def note(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Add one result to the file, with the day, the commit and the machine it was measured on."""
    stamped = row | {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "beside": options.beside,
    }
    with options.results.open("a") as file:
        file.write(json.dumps(stamped) + "\n")


def results_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read all results so far."""
    return [json.loads(line) for line in options.results.read_text().splitlines()]


def say(line: str) -> None:
    """Write a line of progress to stderr."""
    sys.stderr.write(line + "\n")


def machine() -> str:
    """Describe this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, {memory / 2**30:.0f} GiB"


def commit() -> str:
    """Return the commit that is checked out; empty without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=ROOT, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except OSError:
        return ""
    return done.stdout.strip()


def measured(results: Sequence[dict[str, Any]], command: str) -> str:
    """Return the sentence with date, commit and machine of the figures."""

    def all_of(key: str) -> str:
        return ", ".join(sorted({row[key] for row in results if row.get(key)}))

    return (
        f"Written by `{command}`; measured on {all_of('date')} at {all_of('commit') or 'no commit'}"
        f" on {all_of('machine')}, with {all_of('beside')} beside it."
    )


def paragraph(text: str) -> list[str]:
    """Wrap text into lines of the page."""
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def table(header: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table; ``header`` is its first line without the outer bars."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", f"|{' --- |' * columns}"]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]


def write_section(page: Path, title: str, lines: Sequence[str], head: str = _HEAD) -> None:
    """Replace one section of the page, or add it; the others stay as they are."""
    before = page.read_text() if page.exists() else ""
    sections = re.split(r"^## ", before, flags=re.MULTILINE)[1:]
    by_title = {section.partition("\n")[0]: section.partition("\n")[2] for section in sections}
    by_title[title] = "\n" + "\n".join(lines) + "\n"
    texts = [f"## {name}\n\n{text.strip()}\n" for name, text in by_title.items()]
    page.write_text("\n".join([head, *texts]))


def write_failures(results: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """List the errors of results; empty without errors.

    A row may be given a ``mended`` by hand, which says how the error was fixed.
    """
    failed = [row for row in results if row["error"]]
    if not failed:
        return []
    said = [
        f"* {', '.join(str(row[key]) for key in keys)}: {' '.join(row['error'].split())}"
        + (f". {row['mended']}" if row.get("mended") else "")
        for row in failed
    ]
    return ["", "Not as expected:", "", *said]
