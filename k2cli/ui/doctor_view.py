"""Findings of the doctor, as text of 80 columns and as a JSON document."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from rich.text import Text

from k2cli.ui.output import print_line, print_styled, print_text
from k2cli.units import one_line

if TYPE_CHECKING:
    from k2cli.doctor.examination import Report
    from k2cli.doctor.results import CheckResult

SCHEMA_VERSION = 1
_WIDTH = 80
_MARKS = {"pass": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def print_report(report: Report) -> None:
    """Print each finding with its remedy below it, the recommendations, and a summary."""
    for status, label, text, hint in _merged(report.results):
        _print_finding(status, label, text)
        if hint:
            _print_hint(hint)
    print_text()
    if report.recommendation is not None:
        _print_wrapped("transport", f"{report.recommendation.backend}: {_reason(report)}")
    for setting in report.settings:
        value = "leave unset" if setting.value is None else setting.value
        _print_wrapped(setting.name, f"{value}: {setting.reason}")
    print_text(_verdict(report.results))


def _reason(report: Report) -> str:
    return report.recommendation.reason if report.recommendation is not None else ""


def _merged(results: Sequence[CheckResult]) -> list[tuple[str, str, str, str | None]]:
    """Merge findings that are equal but for the node into one that names all the nodes."""
    merged: dict[tuple[str, str, str, str | None], list[str]] = {}
    for result in results:
        key = (result.status, result.name, result.detail, result.hint)
        merged.setdefault(key, []).extend([result.node] if result.node else [])
    return [
        (status, name, f"{', '.join(nodes)}: {detail}" if nodes else detail, hint)
        for (status, name, detail, hint), nodes in merged.items()
    ]


def _print_finding(status: str, label: str, text: str) -> None:
    lines = textwrap.wrap(text, _WIDTH - 22, break_long_words=False, break_on_hyphens=False) or [""]
    mark = Text(_MARKS[status].ljust(6), style=_STYLES[status])
    print_styled(mark.append(one_line(f"{label.ljust(15)} {lines[0]}").rstrip(), style="default"))
    for line in lines[1:]:
        print_line(f"{'':22}{line}")


def _print_hint(hint: str) -> None:
    # Commands are not wrapped, so that they can be copied.
    print_line(f"{'':15}fix:   {hint}")


def _print_wrapped(label: str, text: str) -> None:
    lines = textwrap.wrap(text, _WIDTH - 22, break_long_words=False, break_on_hyphens=False)
    if len(label) > 20:
        print_line(f"{label}:")
    else:
        print_line(f"{(label + ':').ljust(22)}{lines.pop(0)}")
    for line in lines:
        print_line(f"{'':22}{line}")


def _verdict(results: Sequence[CheckResult]) -> str:
    counts = {status: sum(r.status == status for r in results) for status in _MARKS}
    parts = [f"{counts['fail']} failed", f"{counts['warn']} warned", f"{counts['pass']} passed"]
    return ", ".join(parts)


def report_document(report: Report) -> dict[str, Any]:
    """Return the report as printed by ``--json``; docs/reference/contracts.md lists its fields."""
    situation = report.situation
    document = {
        "schema_version": SCHEMA_VERSION,
        "status": _worst(report.results),
        "checks": report.results,
        "nodes": [
            {
                "name": node.node,
                "failure": node.failure,
                "machine": node.machine,
                "software": node.software,
                "condition": node.condition,
            }
            for node in situation.nodes
        ],
        "links": report.links,
        "reaches": situation.reaches,
        "link_measurements": situation.links,
        "disks": situation.disks,
        "recommendation": report.recommendation,
        "settings": report.settings,
    }
    built: dict[str, Any] = msgspec.to_builtins(document)
    return built


def _worst(results: Sequence[CheckResult]) -> str:
    found = {result.status for result in results}
    return next((status for status in ("fail", "warn") if status in found), "pass")
