"""Formats of a report for programs: CSV, JSON Lines and SQL."""

from __future__ import annotations

import csv
import io
from typing import Any

import msgspec

from k2cli.bench.report import BenchReport, report_members, row_members

_TABLE = "k2_bench"


def _flat_rows(report: BenchReport) -> list[dict[str, Any]]:
    """Return one flat record per row, with the members that identify it."""
    common = report_members(report)
    run = common.pop("run") or {}
    environment = common.pop("environment")
    flat = []
    for row in report.rows:
        members = row_members(row)
        samples = msgspec.json.encode(members.pop("samples")).decode()
        flat.append(
            {
                **common,
                **{f"{name}_version": environment[name] for name in ("k2", "mlx", "python")},
                "system": environment["system"],
                "machine": environment["machine"],
                "run_id": run.get("run_id"),
                "backend": run.get("backend"),
                "strategy": run.get("strategy"),
                "ranks": run.get("ranks"),
                "nodes": ",".join(run.get("nodes", [])),
                **members,
                "samples": samples,
            }
        )
    return flat


def to_json_lines(report: BenchReport) -> str:
    """Format one complete JSON document per row."""
    common = report_members(report)
    documents = [{**common, **row_members(row)} for row in report.rows]
    return "\n".join(msgspec.json.encode(document).decode() for document in documents)


def to_csv(report: BenchReport) -> str:
    """Format a header and one line per row; the last column has the raw samples as JSON."""
    rows = _flat_rows(report)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def to_sql(report: BenchReport) -> str:
    """Format statements that create and fill a table in SQLite or PostgreSQL."""
    rows = _flat_rows(report)
    columns = ",\n".join(f"  {name} {_sql_type(rows, name)}" for name in rows[0])
    statements = [f"CREATE TABLE IF NOT EXISTS {_TABLE} (\n{columns}\n);"]
    for row in rows:
        values = ", ".join(_sql_value(value) for value in row.values())
        statements.append(f"INSERT INTO {_TABLE} ({', '.join(row)}) VALUES ({values});")
    return "\n".join(statements)


def _sql_type(rows: list[dict[str, Any]], name: str) -> str:
    kinds = {type(row[name]) for row in rows}
    if float in kinds or "deviation" in name:
        return "DOUBLE PRECISION"
    return "INTEGER" if int in kinds or name == "ranks" else "TEXT"


def _sql_value(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"
