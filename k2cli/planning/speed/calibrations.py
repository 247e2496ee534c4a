"""The owner's calibrations: one file in the user's configuration, one entry per group of machines.

An entry belongs to the machines of a run (their names and memory) and to their transport. Plans for
the same machines use it; plans for others use the fitted constants.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from k2cli.choices import Transport, WantedTransport
from k2cli.errors import K2Error
from k2cli.files import (
    decode_json,
    encode_json,
    is_of_later_version,
    read_regular,
    unwritable,
    write_atomically,
)
from k2cli.planning.hardware.machine import MeasuredSpeed, NodeMemory, NodeRates
from k2cli.settings import config_directory

_LIMIT_BYTES = 16 * 2**20
SCHEMA_VERSION = 1

NOISY_DEVIATION = 0.1
"""Repetitions on a machine with nothing else to do differ by a few percent."""


@dataclass(frozen=True, slots=True)
class CalibratedMachines:
    """A calibration. ``machines`` are name and memory in bytes of each rank's machine, sorted.

    ``backend`` is the run's transport. ``deviation`` is that of ``MeasuredSpeed``.
    """

    machines: tuple[tuple[str, int], ...]
    backend: Transport
    model: str
    measured_on: str
    rates: NodeRates
    collective_seconds: float | None
    deviation: float = 0.0

    def of(self, machines: tuple[tuple[str, int], ...], transport: WantedTransport) -> bool:
        """True if the calibration is for these machines; ``auto`` matches any transport."""
        return self.machines == machines and transport in ("auto", self.backend)


@dataclass(frozen=True, slots=True)
class _File:
    entries: tuple[CalibratedMachines, ...] = ()
    schema_version: int = SCHEMA_VERSION


def calibration_file() -> Path:
    """Return the path of the calibrations."""
    return config_directory() / "calibration.json"


def machines_of(nodes: Sequence[NodeMemory]) -> tuple[tuple[str, int], ...]:
    """Return the machines' key of a calibration; the transport is the other part."""
    return tuple(sorted((node.name, node.memory_bytes) for node in nodes))


def save_calibration(entry: CalibratedMachines) -> Path:
    """Save an entry; it replaces an older one of the same machines and transport.

    Raises:
        K2Error: if the file cannot be read or written, or a later version of k2 has written it.
    """
    path = calibration_file()
    if is_of_later_version(path, SCHEMA_VERSION):
        quoted = shlex.quote(str(path))
        raise K2Error(f"{path} is of a later version of k2", f"mv {quoted} {quoted}.later")
    others = [each for each in _read(path) if not each.of(entry.machines, entry.backend)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_json(_File((*others, entry))))
    except OSError as error:
        raise unwritable(error, path) from error
    return path


def with_calibration(
    nodes: Sequence[NodeMemory], transport: WantedTransport = "auto"
) -> list[NodeMemory]:
    """Add the newest matching calibration to the machines, if there is one.

    Raises:
        K2Error: if the file of calibrations is damaged.
    """
    machines = machines_of(nodes)
    fitting = [each for each in _read(calibration_file()) if each.of(machines, transport)]
    if not fitting:
        return list(nodes)
    entry = fitting[-1]
    source = f"measured on {entry.measured_on} with {entry.model} by k2 bench --calibrate"
    if entry.deviation > NOISY_DEVIATION:
        source += f" while the machine was busy (repetitions differed by {entry.deviation:.0%})"
    measured = MeasuredSpeed(entry.rates, entry.collective_seconds, source, entry.deviation)
    return [replace(node, measured=measured) for node in nodes]


def _read(path: Path) -> tuple[CalibratedMachines, ...]:
    try:
        data = read_regular(path, _LIMIT_BYTES, follow_links=True)
    except (FileNotFoundError, NotADirectoryError):  # HOME may be a file
        return ()
    except OSError as error:
        raise K2Error(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = decode_json(data, type=_File)
    except (msgspec.MsgspecError, ValueError) as error:
        raise K2Error(f"{path} is damaged: {error}", f"rm {path}") from error
    return found.entries if found.schema_version == SCHEMA_VERSION else ()
