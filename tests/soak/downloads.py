"""Downloads from a mock Hub on this machine: ``scripts/soak downloads``.

* **Kills**: ``k2 download`` is ended by SIGKILL at random moments, drawn by seed, and then
  run to its end. The bytes that the Hub sent in all runs are compared with the model's size.
* **Time**: ``k2 download`` and ``hf download``, one after the other in each round, each into an
  empty cache; the order changes with every round.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.models.sources.expected_files import verify_file
from k2cli.models.sources.snapshot_record import recorded_snapshot
from tests.soak.download_hub import SHARDS, HubProcess, hub_process, make_model
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

MOST_BYTES_RATIO = 1.05
COMMANDS = {
    "k2": [sys.executable, "-m", "k2cli", "download", "mock/model"],
    "hf": [str(Path(sys.executable).with_name("hf")), "download", "mock/model"],
}
PAGE_HEAD = """\
# Weights

This page shows what was measured of downloading, checking and passing on weights. Times are valid
for that machine and for what else ran on it; bytes do not depend on the machine.
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its status, and what it took."""

    status: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    said: str
    sent_bytes: int = 0


def _environment(home: Path, hub: HubProcess) -> dict[str, str]:
    # Xet needs servers of its own; without it both sides use HTTP.
    return os.environ | {
        "HF_HOME": str(home), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def _run(name: str, home: Path, hub: HubProcess, kill_after_bytes: int | None = None) -> Ended:
    log = home.with_suffix(".log")
    begun = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            COMMANDS[name],
            env=_environment(home, hub),
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
        sent = 0
        if kill_after_bytes is not None:
            sent = _wait_for_bytes(process, hub, kill_after_bytes)
            process.kill()
        _, status, used = os.wait4(process.pid, 0) if process.returncode is None else (0, 0, None)
    peak = (used.ru_maxrss if used else 0) * (1 if sys.platform == "darwin" else 1024)
    cpu = used.ru_utime + used.ru_stime if used else 0.0
    code = process.returncode if used is None else os.waitstatus_to_exitcode(status)
    process.returncode = code
    seconds = time.monotonic() - begun
    return Ended(code or 0, seconds, cpu, peak, log.read_text()[-2000:], sent)


def _wait_for_bytes(process: subprocess.Popen[bytes], hub: HubProcess, count: int) -> int:
    """Wait until the Hub has sent so many bytes, and return how many it has sent."""
    sent = 0
    while process.poll() is None and sent < count:
        time.sleep(0.002)
        sent += hub.sent_bytes()
    return sent


def _check(home: Path) -> str:
    """Return what is wrong with the model in a cache; "" if every byte is right."""
    (folder,) = (home / "hub" / "models--mock--model" / "snapshots").iterdir()
    record = recorded_snapshot(folder)
    if record is None:
        return "there is no record"
    damages = [
        f"{file.name} {damage}"
        for file in record.files
        if (damage := verify_file(folder / file.name, file)) is not None
    ]
    left = [path.name for path in (folder.parent.parent / "blobs").glob("*.*")]
    return ", ".join(damages + left)


def measure_kills(options: argparse.Namespace, folder: Path, hub: HubProcess, size: int) -> None:
    """Kill a download at random moments, and count the bytes of all its runs.

    A moment is drawn as the bytes that a run has been sent, so that the kills are spread over the
    whole transfer however fast it is.
    """
    source, home = random.Random(options.seed), folder / "killed"
    sent = 0
    hub.sent_bytes()
    for number in range(options.kills):
        most = 1.8 * (size - sent) / (options.kills - number + 1)
        ended = _run("k2", home, hub, int(source.uniform(0, most)))
        count = ended.sent_bytes + hub.sent_bytes()
        sent += count
        say(f"kill {number + 1}: {count / 1e6:.1f} MB, status {ended.status}")
    ended = _run("k2", home, hub)
    sent += hub.sent_bytes()
    error = _check(home) if ended.status == 0 else ended.said
    row = {"part": "kills", "kills": options.kills, "sent_bytes": sent, "model_bytes": size}
    note(options, row | {"error": error})
    say(f"{options.kills} kills: {sent / size:.4f} times the size; {error or 'all files right'}")
    shutil.rmtree(home)


def measure_time(options: argparse.Namespace, folder: Path, hub: HubProcess, size: int) -> None:
    """Download with both, alternating."""
    for number in range(options.rounds):
        names = list(COMMANDS) if number % 2 == 0 else list(reversed(COMMANDS))
        for name in names:
            home = folder / f"round-{number}-{name}"
            ended = _run(name, home, hub)
            error = "" if ended.status == 0 else ended.said
            if name == "k2" and not error:
                error = _check(home)
            row = {
                "part": "time", "tool": name, "round": number, "seconds": ended.seconds,
                "cpu_seconds": ended.cpu_seconds, "peak_bytes": ended.peak_bytes,
                "model_bytes": size, "sent_bytes": hub.sent_bytes(), "error": error,
            }  # fmt: skip
            note(options, row)
            say(f"round {number} {name}: {ended.seconds:.2f} s, CPU {ended.cpu_seconds:.1f} s, "
                f"{ended.peak_bytes / 1e6:.0f} MB {error}")  # fmt: skip
            shutil.rmtree(home)


def write_page(options: argparse.Namespace) -> None:
    """Write the section of downloads from all results."""
    results = results_of(options)
    timed = [row for row in results if row["part"] == "time" and not row["error"]]
    kills = [row for row in results if row["part"] == "kills"]
    lines = [*paragraph(measured(results, "scripts/soak downloads")), ""]
    rows = []
    for name in COMMANDS:
        own = [row for row in timed if row["tool"] == name]
        rows.append(_time_row(f"`{name} download`", own))
    lines += table(
        "tool | rounds | seconds: median (least to most) | CPU seconds | peak memory", rows
    )
    medians = {
        name: statistics.median(row["seconds"] for row in timed if row["tool"] == name)
        for name in COMMANDS
    }
    size = timed[0]["model_bytes"]
    lines += ["", *paragraph(
        f"The model has {size / 1e9:.2f} GB in {SHARDS} shards. `hf` takes "
        f"{medians['hf'] / medians['k2']:.2f} times as long as `k2` (above 1: k2 is faster). k2 "
        "verifies each byte by its hash meanwhile; hf over HTTP does not. Both write to the page "
        "cache, and neither waits for the disk."
    ), ""]  # fmt: skip
    header = "kills at random moments | bytes sent by the Hub | times the model's size | afterwards"
    lines += table(header, [_kill_row(row) for row in kills])
    write_section(options.docs, "Downloads", lines, PAGE_HEAD)


def _kill_row(row: dict[str, Any]) -> tuple[object, ...]:
    ratio = row["sent_bytes"] / row["model_bytes"]
    state = row["error"] or "every file right by its hash"
    return row["kills"], f"{row['sent_bytes']:,}", f"{ratio:.4f}", state


def _time_row(name: str, rows: list[dict[str, Any]]) -> tuple[object, ...]:
    seconds = [row["seconds"] for row in rows]
    cpu = statistics.median(row["cpu_seconds"] for row in rows)
    peak = max(row["peak_bytes"] for row in rows)
    spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    return name, len(rows), spread, f"{cpu:.1f}", f"{peak / 1e6:.0f} MB"


def main() -> int:
    """Measure, and write the page; return 1 if a target is missed."""
    parser = parser_of("downloads", __doc__)
    parser.set_defaults(docs=ROOT / "docs" / "measurements" / "weights.md")
    parser.add_argument("--rounds", type=int, default=7, help="of both tools (%(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()
    begin(options)
    with workplace() as (folder, toy):
        size = make_model(toy, folder / "model", int(options.gigabytes * 1e9))
        with hub_process(folder / "model") as hub:
            measure_time(options, folder, hub, size)
            measure_kills(options, folder, hub, size)
    write_page(options)
    results = results_of(options)
    failed = [row for row in results if row["error"]]
    wasteful = [
        row
        for row in results
        if row["part"] == "kills" and row["sent_bytes"] > MOST_BYTES_RATIO * row["model_bytes"]
    ]
    return 1 if failed or wasteful else 0


if __name__ == "__main__":
    sys.exit(main())
