"""The table and the JSON document of the results."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.statistics import Summary

BEGIN = "<!-- table: scripts/benchmark-peers -->"
END = "<!-- end of table -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of one piece of work. ``ratio`` is above 1 where k2 was the better one."""

    model: str
    placement: str
    work: str
    unit: str
    ours: Summary
    theirs: Summary
    ratio: Summary
    target: float | None = None
    equal_answers: int | None = None
    answers: int | None = None


def environment() -> dict[str, Any]:
    """Return the machine and the versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("mlx", "mlx-lm", "k2cli")},
        "load_average": os.getloadavg(),
    }


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(name)
    except PackageNotFoundError:
        return "checkout"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table, one line per row."""
    lines = [
        "| model | ranks | work | k2 | mlx-lm | ratio (range) | target | same tokens |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            row.model,
            row.placement,
            row.work,
            f"{_number(row.ours.median)} {row.unit}",
            f"{_number(row.theirs.median)} {row.unit}",
            f"{row.ratio.median:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})",
            _target(row),
            "" if row.answers is None else f"{row.equal_answers} of {row.answers}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{row.target:.2f} {'met' if row.ratio.median >= row.target else 'missed'}"


def _number(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def document(rows: Sequence[Row], options: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON document, with the samples of every round."""
    return {
        "schema_version": 1,
        "environment": environment(),
        "options": options,
        "rows": [asdict(row) for row in rows],
    }


def heading(options: dict[str, Any]) -> str:
    """Return a line with the machine, the versions and the number of rounds."""
    found = environment()
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['system']}; {versions}; "
        f"{options['rounds']} rounds, {options.get('cores_per_node', 1)} core(s) per node."
    )


def rows_of(found: dict[str, Any]) -> list[Row]:
    """Return the rows of a JSON document."""
    rows = []
    for fields in found["rows"]:
        summaries = {
            name: Summary(**fields[name] | {"samples": tuple(fields[name]["samples"])})
            for name in ("ours", "theirs", "ratio")
        }
        rows.append(Row(**fields | summaries))
    return rows


def merged(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Replace earlier rows by new ones of the same work, and append the other new ones."""
    new = {(row.model, row.placement, row.work): row for row in rows}
    kept = [new.pop((row.model, row.placement, row.work), row) for row in earlier]
    return [*kept, *new.values()]


def replace_rows(text: str, rows: Sequence[Row]) -> str:
    """Replace the lines of these rows in a document's table, and keep its other lines."""
    new = {_key(line): line for line in table(rows).splitlines()[2:]}
    return "\n".join(new.get(_key(line), line) for line in text.split("\n"))


def _key(line: str) -> tuple[str, ...]:
    return tuple(line.split(" | ")[:3])


def into_document(text: str, generated: str) -> str:
    """Replace the text between the two marks.

    Raises:
        ValueError: if the marks are missing.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{BEGIN}\n\n{generated}\n\n{END}", text)
    if count != 1:
        raise ValueError(f"there must be one {BEGIN} and one {END}, in this order")
    return changed
