"""Verification of a model on this machine: ``scripts/soak verify``.

``k2 models verify`` on a model with a record, beside ``sha256sum`` and ``openssl dgst`` with as
many processes as cores. All read the same files from the page cache, one after the other in each
round; the order changes with every round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from k2cli.models.digests import sha256_of
from k2cli.models.inventory.verified import last_verified
from k2cli.models.sources.expected_files import ExpectedFile
from k2cli.models.sources.snapshot_record import SnapshotRecord, recorded_snapshot, write_record
from tests.soak.download_hub import HASHES, SHARDS, make_model
from tests.soak.downloads import PAGE_HEAD
from tests.soak.page import (
    ROOT,
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

MOST_TIME_RATIO = 1.1
CORES = os.cpu_count() or 1
TOOLS = {
    "k2 models verify": [sys.executable, "-m", "k2cli", "models", "verify"],
    f"sha256sum, {CORES} processes": ["sha256sum"],
    f"openssl dgst -sha256, {CORES} processes": ["openssl", "dgst", "-sha256"],
}


def _command(tool: str, folder: Path) -> list[str]:
    if tool.startswith("k2"):
        return [*TOOLS[tool], str(folder)]
    names = [str(path) for path in sorted(folder.iterdir()) if path.is_file()]
    return ["xargs", "-a", _list(folder, names), f"-P{CORES}", "-n1", *TOOLS[tool]]


def _list(folder: Path, names: list[str]) -> str:
    path = folder.with_suffix(".names")
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def _record(folder: Path) -> int:
    """Write the record that a download would have left; return the bytes of all files."""
    (folder / HASHES).unlink()
    files = tuple(
        ExpectedFile(path.name, path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
    )
    write_record(folder, SnapshotRecord("hub", "mock/model", "main", "0" * 40, files))
    return sum(file.nbytes for file in files)


def _run(tool: str, folder: Path) -> dict[str, Any]:
    command = _command(tool, folder)
    begun, before = time.monotonic(), os.times()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    seconds, after = time.monotonic() - begun, os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    error = "" if done.returncode == 0 else (done.stdout + done.stderr)[-500:]
    return {"tool": tool, "seconds": seconds, "cpu_seconds": used, "error": error}


def measure(options: argparse.Namespace, folder: Path, size: int) -> None:
    """Run all tools, alternating; the first pass fills the page cache and does not count."""
    for number in range(-1, options.rounds):
        tools = list(TOOLS) if number % 2 == 0 else list(reversed(TOOLS))
        for tool in tools:
            load = os.getloadavg()[0]
            row = _run(tool, folder) | {"round": number, "load": load, "model_bytes": size}
            say(f"round {number} {tool}: {row['seconds']:.2f} s, CPU {row['cpu_seconds']:.2f} s, "
                f"load {load:.1f} {row['error']}")  # fmt: skip
            if number >= 0:
                note(options, row)
    # The record itself is a file of the folder, too, and of no interest here.
    record = recorded_snapshot(folder)
    assert isinstance(record, SnapshotRecord)
    assert last_verified(folder, [file.name for file in record.files]) is not None


def write_page(options: argparse.Namespace) -> None:
    """Write the section of verification from all results."""
    results = [row for row in results_of(options) if not row["error"]]
    lines = [*paragraph(measured(results, "scripts/soak verify")), ""]
    medians, rows = {}, []
    for tool in TOOLS:
        own = [row for row in results if row["tool"] == tool]
        seconds = [row["seconds"] for row in own]
        medians[tool] = statistics.median(seconds)
        cpu = statistics.median(row["cpu_seconds"] for row in own)
        spread = f"{medians[tool]:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        rate = own[0]["model_bytes"] / medians[tool] / 1e9
        ratio = f"{medians['k2 models verify'] / medians[tool]:.2f}"
        rows.append((f"`{tool}`", len(own), spread, f"{cpu:.2f}", f"{rate:.2f}", ratio))
    header = "tool | rounds | seconds: median (least to most) | CPU seconds | GB/s | k2 to it"
    lines += table(header, rows)
    loads = [row["load"] for row in results]
    size = results[0]["model_bytes"]
    lines += ["", *paragraph(
        f"The model has {size / 1e9:.2f} GB in {SHARDS} shards, all in the page cache; nice is 0. "
        f"The load of the machine was {min(loads):.1f} to {max(loads):.1f} on {CORES} cores. k2's "
        "time has its start, the headers and the index in it. openssl uses the processor's "
        "instructions for SHA-256, as k2 does; sha256sum only if it was built so. A last column of "
        f"at most {MOST_TIME_RATIO} is the target."
    )]  # fmt: skip
    write_section(options.docs, "Verification", lines, PAGE_HEAD)


def main() -> int:
    """Measure, and write the page; return 1 if the target is missed."""
    parser = parser_of("verify", __doc__)
    parser.set_defaults(docs=ROOT / "docs" / "measurements" / "weights.md")
    parser.add_argument("--rounds", type=int, default=5, help="of all tools (%(default)s)")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="(%(default)s)")
    options = parser.parse_args()
    begin(options)
    with workplace() as (folder, toy):
        make_model(toy, folder / "model", int(options.gigabytes * 1e9))
        size = _record(folder / "model")
        measure(options, folder / "model", size)
    write_page(options)
    results = results_of(options)
    medians = {
        tool: statistics.median(row["seconds"] for row in results if row["tool"] == tool)
        for tool in TOOLS
    }
    say(json.dumps(medians))
    own = medians["k2 models verify"]
    slow = any(own > MOST_TIME_RATIO * medians[tool] for tool in TOOLS)
    return 1 if slow or any(row["error"] for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
