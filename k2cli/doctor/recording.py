"""Recordings of an examination: a folder with every probe's output, redacted, and a manifest.

The owner of the machines can send it; ``k2 doctor --replay`` and the tests run the checks over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from k2cli import __version__
from k2cli.agent.software import Software
from k2cli.choices import WantedTransport
from k2cli.cluster.facts.probes import ProbeOutput, RawProbes, System
from k2cli.cluster.links import detect_links
from k2cli.cluster.measure import DiskSpeed, LinkMeasurement, Reach
from k2cli.doctor.examination import Report, report_on, situation_of
from k2cli.doctor.redaction import Redactor, names_in
from k2cli.doctor.results import Need, Situation
from k2cli.errors import UsageError
from k2cli.files import decode_json, encode_json, read_regular, unwritable
from k2cli.settings import user_name
from k2cli.units import MIB

SCHEMA_VERSION = 1
_MAX_FILE_BYTES = 32 * MIB
MANIFEST = "manifest.json"


class RecordedProbe(msgspec.Struct, frozen=True):
    """One probe; ``file`` is the path of its output, relative to the recording's folder."""

    file: str
    status: int
    stderr: str = ""
    started: float = 0.0
    ended: float = 0.0


class RecordedNode(msgspec.Struct, frozen=True):
    """One node under its pseudonym."""

    name: str
    system: System | None
    probes: dict[str, RecordedProbe] = {}
    failure: str | None = None
    hint: str | None = None


class Manifest(msgspec.Struct, frozen=True):
    """Table of contents of a recording, and the measurements."""

    nodes: tuple[RecordedNode, ...]
    schema_version: int = SCHEMA_VERSION
    k2_version: str = ""
    transport: WantedTransport = msgspec.field(default="auto", name="backend")
    quick: bool = False
    reference: Software | None = None
    needs: dict[str, Need] = {}
    live_runs: tuple[str, ...] = ()
    ended_runs: tuple[str, ...] = ()
    reaches: tuple[Reach, ...] | None = None
    links: tuple[LinkMeasurement, ...] | None = None
    disks: dict[str, DiskSpeed] | None = None


def record(report: Report, folder: Path, redactor: Redactor | None = None) -> Path:
    """Write a recording into a folder that is new or empty.

    Returns:
        The manifest's path.

    Raises:
        UsageError: if the folder is not empty.
        K2Error: if it cannot be written.
    """
    redactor = redactor or Redactor()
    _learn_names(report, redactor)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"'{folder}' is not empty", "name a new folder: --record FOLDER")
        nodes = tuple(_write_node(raw, folder, redactor) for raw in report.probes)
        path = folder / MANIFEST
        manifest = _manifest(report, nodes, redactor)
        path.write_bytes(encode_json(manifest))
    except OSError as error:
        raise unwritable(error, folder) from error
    return path


def _learn_names(report: Report, redactor: Redactor) -> None:
    """Collect all names before the first output is redacted: each may occur in any output."""
    for raw in report.probes:
        redactor.know_name("node", raw.node)
        for name in names_in([(raw.text("hostname") or "")]):
            redactor.know_name("host", name)
    user = user_name()
    if user not in ("", "root"):
        redactor.know_name("user", user)


def _write_node(raw: RawProbes, folder: Path, redactor: Redactor) -> RecordedNode:
    name = redactor.know_name("node", raw.node)
    (folder / name).mkdir()
    probes = {}
    for probe, output in raw.outputs.items():
        file = f"{name}/{probe}.{'json' if probe in ('k2', 'ip', 'system_profiler') else 'txt'}"
        (folder / file).write_text(
            redactor.probe(probe, output.stdout), encoding="utf-8", errors="replace"
        )
        stderr = redactor.text(output.stderr)
        probes[probe] = RecordedProbe(file, output.status, stderr, output.started, output.ended)
    failure, hint = (redactor.text(each) if each else None for each in (raw.failure, raw.hint))
    return RecordedNode(name, raw.system, probes, failure, hint)


def _manifest(report: Report, nodes: tuple[RecordedNode, ...], redactor: Redactor) -> Manifest:
    situation = report.situation
    measured: dict[str, Any] = msgspec.to_builtins(
        {
            "needs": dict(situation.needs),
            "reaches": situation.reaches,
            "links": situation.links,
            "disks": dict(situation.disks) if situation.disks is not None else None,
        }
    )
    reference = situation.reference
    own = redactor.probe("k2", msgspec.json.encode(reference).decode()) if reference else "null"
    document = {
        "nodes": msgspec.to_builtins(nodes),
        "k2_version": __version__,
        "backend": situation.transport,
        "quick": report.quick,
        "live_runs": [redactor.run_id(run) for run in sorted(situation.live_runs)],
        "ended_runs": [redactor.run_id(run) for run in sorted(situation.ended_runs)],
        "reference": decode_json(own, type=object),
        **redactor.document(measured),
    }
    return msgspec.convert(document, Manifest)


def replay(folder: Path) -> Report:
    """Run the checks of this k2 over a recording.

    Raises:
        UsageError: if the folder has no recording that this k2 can read.
    """
    manifest = _read_manifest(folder)
    probes = [_read_node(node, folder) for node in manifest.nodes]
    situation = situation_of(probes, manifest.needs, manifest.transport)
    return report_on(
        _with_measured(situation, manifest),
        detect_links(situation.machines),
        probes,
        quick=manifest.quick,
    )


def _with_measured(situation: Situation, manifest: Manifest) -> Situation:
    return replace(
        situation,
        reference=manifest.reference,
        live_runs=frozenset(manifest.live_runs),
        ended_runs=frozenset(manifest.ended_runs),
        reaches=manifest.reaches,
        links=manifest.links,
        disks=manifest.disks,
    )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        manifest = decode_json(
            read_regular(path, _MAX_FILE_BYTES, follow_links=True), type=Manifest
        )
    except OSError as error:
        raise UsageError(
            f"'{folder}' has no recording: {error.strerror}", "k2 doctor --record FOLDER makes one"
        ) from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"'{path}' is not a recording: {error}") from error
    if manifest.schema_version > SCHEMA_VERSION:
        raise UsageError(f"'{folder}' was recorded by a newer k2", "update k2 to replay it")
    return manifest


def _read_node(node: RecordedNode, folder: Path) -> RawProbes:
    outputs: Mapping[str, ProbeOutput] = {
        name: ProbeOutput(
            probe.status, _read(folder, probe.file), probe.stderr, probe.started, probe.ended
        )
        for name, probe in node.probes.items()
    }
    return RawProbes(node.name, node.system, outputs, node.failure, node.hint)


def _read(folder: Path, file: str) -> str:
    try:
        path = (folder / file).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"the recording in '{folder}' names no file: {file!r}") from error
    if folder.resolve() not in path.parents:
        raise UsageError(f"the recording in '{folder}' names a file outside the folder: {file}")
    try:
        return read_regular(path, _MAX_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}', which the recording names, cannot be read: {error}") from error
