"""Facts about a node of any system, read from raw probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from k2cli.agent.software import Software
from k2cli.cluster.facts import parse_linux, parse_macos
from k2cli.cluster.facts.machine import Condition, Examination, MachineFacts
from k2cli.cluster.facts.probes import RawProbes
from k2cli.errors import ClusterError
from k2cli.files import decode_json

_ODD_OUTPUT = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""Errors of the parsers for output of another form than that of the systems that k2 knows."""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:100]}"


def machine_facts(raw: RawProbes) -> MachineFacts:
    """Read the facts of a machine.

    Raises:
        ClusterError: if it could not be reached, or a required fact is missing.
    """
    if raw.failure is not None:
        raise ClusterError(raw.failure, raw.hint)
    found, _ = _software(raw)
    return _machine(raw, found)


def examine(raw: RawProbes) -> Examination:
    """Read everything from a node's probes; unreadable parts are replaced by the reason."""
    if raw.failure is not None:
        return Examination(raw.node, failure=raw.failure, failure_hint=raw.hint)
    software, software_failure = _software(raw)
    try:
        machine, machine_failure = _machine(raw, software), None
    except ClusterError as error:
        machine, machine_failure = None, error.message
    return Examination(
        raw.node,
        machine,
        software,
        _condition(raw, software),
        software_failure=software_failure,
        machine_failure=machine_failure,
    )


def _software(raw: RawProbes) -> tuple[Software | None, str | None]:
    output = raw.outputs.get("k2")
    if output is None:
        return None, "k2 was not asked"
    if output.status != 0:
        return None, output.stderr.strip() or "k2 did not answer"
    try:
        return decode_json(output.stdout, type=Software), None
    except msgspec.MsgspecError as error:
        return None, f"k2 there answers in another format: {error}"


def _machine(raw: RawProbes, software: Software | None) -> MachineFacts:
    parse = parse_macos.machine if raw.system == "Darwin" else parse_linux.machine
    try:
        return parse(raw, software)
    except _ODD_OUTPUT as error:
        raise ClusterError(
            f"node {raw.node}: its system answers in an unexpected form ({_reason(error)})",
            f"k2 doctor --nodes {raw.node} --record FOLDER, and report it",
        ) from error


def _condition(raw: RawProbes, software: Software | None) -> Condition:
    read = parse_macos.condition if raw.system == "Darwin" else parse_linux.condition
    try:
        found = read(raw)
    except _ODD_OUTPUT:
        found = Condition()  # every part of it may be unknown
    offset = clock_offset(raw, software)
    if offset is not None:
        found = replace(found, clock_offset_seconds=offset[0], clock_error_seconds=offset[1])
    return found


def clock_offset(raw: RawProbes, software: Software | None) -> tuple[float, float] | None:
    """Compute that machine's clock minus this one's, and the largest error, in seconds.

    The clock was read at some moment between sending the question and getting the answer, so the
    error is half of that time plus half of the clock's resolution. The more exact of the two
    probes is used.
    """
    found = []
    date = raw.outputs.get("date")
    if date is not None and date.status == 0:
        text = date.stdout.strip()
        try:
            # Without a fraction (macOS) the true time is anywhere within that second.
            whole = "." not in text
            found.append(_offset(float(text) + 0.5 * whole, date.started, date.ended, 0.5 * whole))
        except ValueError:
            pass  # the clock stays unknown
    output = raw.outputs.get("k2")
    if software is not None and output is not None:
        found.append(_offset(software.time, output.started, output.ended, 0.0))
    return min(found, key=lambda item: item[1], default=None)


def _offset(there: float, started: float, ended: float, resolution: float) -> tuple[float, float]:
    return there - (started + ended) / 2, (ended - started) / 2 + resolution


def machines(probes: Mapping[str, RawProbes]) -> dict[str, MachineFacts]:
    """Read ``machine_facts`` of several nodes, by name."""
    return {name: machine_facts(raw) for name, raw in probes.items()}
