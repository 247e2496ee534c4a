"""What the doctor found, for people on 80 columns and as a JSON document."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from k2cli.ui.output import print_text, stdout_console

SCHEMA_VERSION = 1
_WIDTH = 80
_MARKS = {"pass": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


class ResultView(Protocol):
    """One finding."""

    @property
    def status(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def node(self) -> str | None: ...
    @property
    def detail(self) -> str: ...
    @property
    def hint(self) -> str | None: ...


class RecommendationView(Protocol):
    """A back end and why."""

    @property
    def backend(self) -> str: ...
    @property
    def reason(self) -> str: ...


class SettingView(Protocol):
    """A setting and why."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str | None: ...
    @property
    def reason(self) -> str: ...


class ExaminationView(Protocol):
    """One node."""

    @property
    def node(self) -> str: ...
    @property
    def machine(self) -> Any: ...
    @property
    def software(self) -> Any: ...
    @property
    def condition(self) -> Any: ...
    @property
    def failure(self) -> str | None: ...


class SituationView(Protocol):
    """What the checks read."""

    @property
    def nodes(self) -> Sequence[ExaminationView]: ...
    @property
    def reaches(self) -> Sequence[Any] | None: ...
    @property
    def links(self) -> Sequence[Any] | None: ...
    @property
    def disks(self) -> Mapping[str, Any] | None: ...


class ReportView(Protocol):
    """Everything."""

    @property
    def situation(self) -> SituationView: ...
    @property
    def results(self) -> Sequence[ResultView]: ...
    @property
    def links(self) -> Sequence[Any]: ...
    @property
    def recommendation(self) -> RecommendationView | None: ...
    @property
    def settings(self) -> Sequence[SettingView]: ...
    @property
    def failed(self) -> bool: ...


def print_report(report: ReportView) -> None:
    """One block per finding, what mends it below it, and a verdict at the end."""
    for status, label, text, hint in _merged(report.results):
        _print_finding(status, label, text)
        if hint:
            _print_hint(hint)
    print_text()
    if report.recommendation is not None:
        _print_wrapped("back end", f"{report.recommendation.backend}: {_reason(report)}")
    for setting in report.settings:
        value = "leave unset" if setting.value is None else setting.value
        _print_wrapped(setting.name, f"{value}: {setting.reason}")
    print_text(_verdict(report.results))


def _reason(report: ReportView) -> str:
    return report.recommendation.reason if report.recommendation is not None else ""


def _merged(results: Sequence[ResultView]) -> list[tuple[str, str, str, str | None]]:
    """Findings that say the same of several nodes become one line that names them."""
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
    console = stdout_console()
    console.print(_MARKS[status].ljust(6), style=_STYLES[status], end="", markup=False)
    console.print(f"{label.ljust(15)} {lines[0]}".rstrip(), markup=False)
    for line in lines[1:]:
        print_text(f"{'':22}{line}")


def _print_hint(hint: str) -> None:
    # A command is not broken: it is there to be copied.
    print_text(f"{'':15}mend:  {hint}")


def _print_wrapped(label: str, text: str) -> None:
    lines = textwrap.wrap(text, _WIDTH - 22, break_long_words=False, break_on_hyphens=False)
    if len(label) > 20:
        print_text(f"{label}:")
    else:
        print_text(f"{(label + ':').ljust(22)}{lines.pop(0)}")
    for line in lines:
        print_text(f"{'':22}{line}")


def _verdict(results: Sequence[ResultView]) -> str:
    counts = {status: sum(r.status == status for r in results) for status in _MARKS}
    parts = [f"{counts['fail']} failed", f"{counts['warn']} warned", f"{counts['pass']} passed"]
    return ", ".join(parts)


def report_document(report: ReportView) -> dict[str, Any]:
    """The report as ``--json`` prints it; docs/contracts.md has its fields."""
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


def _worst(results: Sequence[ResultView]) -> str:
    found = {result.status for result in results}
    return next((status for status in ("fail", "warn") if status in found), "pass")
