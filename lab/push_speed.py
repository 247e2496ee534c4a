"""Speed of ``k2 models push`` between two hosts of the lab, against rsync over ssh.

    python -m lab.push_speed --rounds 5 --gigabytes 2
    python -m lab.push_speed --rounds 2 --gigabytes 2 --megabits 250

All ways take turns in each round. Source and target are in memory, so that no disk counts. The
processor time of the sending host is that of the command with its children; of the receiving one
that of sshd's sessions.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.laboratory import Lab
from lab.link import DEVICE

_MODEL = "/tmp/m/model"
_FILES = 16
_MIB = 2**20
_K2 = [sys.executable, "-m", "k2cli", "models", "push", _MODEL]
WAYS: dict[str, list[str]] = {
    "k2 over TLS": [*_K2, "k2b", "--over", "tls"],
    "k2 inside ssh": [*_K2, "k2b", "--over", "ssh"],
    "rsync over ssh": ["rsync", "-a", f"{_MODEL}/", f"k2b:{_MODEL}/"],
    "rsync, aes128-gcm": [
        "rsync", "-a", "-e", "ssh -c aes128-gcm@openssh.com", f"{_MODEL}/", f"k2b:{_MODEL}/",
    ],
}  # fmt: skip
_MAKE = """
import json, os, struct, sys
folder, files, nbytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.makedirs(folder)
json.dump({"model_type": "llama"}, open(f"{folder}/config.json", "w"))
for i in range(1, files + 1):
    entry = {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}
    header = json.dumps({f"model.layers.{i}.w": entry}).encode()
    header += b" " * (-len(header) % 8)
    with open(f"{folder}/model-{i:05d}-of-{files:05d}.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(nbytes // 2**20):
            file.write(os.urandom(2**20))
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One transfer: its time, and the processor time at both ends."""

    seconds: float
    sender_cpu_seconds: float
    receiver_cpu_seconds: float


def _sshd_cpu_seconds(lab: Lab, host: str) -> float:
    """Return the processor time of all sessions of a host's sshd that have ended."""
    total = 0
    for process in lab.all_processes(host):
        if "sshd" in process.command.split()[0]:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15])
    return total / os.sysconf("SC_CLK_TCK")


def measure(lab: Lab, command: Sequence[str], host: str = "k2a") -> Measured:
    """Run one transfer from a host to k2b.

    Raises:
        LabError: if it fails.
    """
    lab.exec("k2b", ["sh", "-c", "rm -rf /tmp/m; mkdir -p /tmp/m"])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    there = _sshd_cpu_seconds(lab, "k2b")
    began = time.monotonic()
    done = lab.exec(host, command, timeout_seconds=600)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise LabError(f"{command[0]} failed: {done.stderr[-500:]}")
    time.sleep(1.0)  # until sshd has waited for its sessions
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    here = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, here, _sshd_cpu_seconds(lab, "k2b") - there)


def compare(lab: Lab, ways: Sequence[str], rounds: int) -> dict[str, list[Measured]]:
    """Measure ways in turn."""
    found: dict[str, list[Measured]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            found[way].append(measure(lab, WAYS[way]))
            sys.stderr.write(f"{number} {way} {found[way][-1]}\n")
    return found


def rows(found: dict[str, list[Measured]], nbytes: int, base: str) -> list[str]:
    """Return the rows of a table: medians, and the speed in multiples of ``base``."""
    table = []
    reference = statistics.median(each.seconds for each in found[base])
    for way, each in found.items():
        seconds = statistics.median(one.seconds for one in each)
        here = statistics.median(one.sender_cpu_seconds for one in each) / nbytes * 1e9
        there = statistics.median(one.receiver_cpu_seconds for one in each) / nbytes * 1e9
        ratios = [b.seconds / a.seconds for a, b in zip(each, found[base], strict=True)]
        table.append(
            f"| {way} | {seconds:.1f} | {nbytes / seconds / 1e6:.0f} | {reference / seconds:.2f} | "
            f"{statistics.median(ratios):.2f} | {here:.2f} | {there:.2f} |"
        )
    return table


def _limit(lab: Lab, megabits: int) -> None:
    """Limit what each host can receive, at its port of the console's bridge."""
    for host in lab.hosts:
        port = f"{host.name}-{DEVICE}"
        rate = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
        done = lab.exec("console", ["tc", "qdisc", "add", "dev", port, "root", "tbf", *rate])
        if done.returncode != 0:
            raise LabError(f"tc cannot limit the link: {done.stderr.strip()}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _make(lab: Lab, host: str, nbytes: int) -> int:
    """Make the model on a host; return its bytes."""
    each = int(nbytes / _FILES / _MIB) * _MIB
    make = [sys.executable, "-c", _MAKE, _MODEL, str(_FILES), str(each)]
    lab.exec(host, make, timeout_seconds=300)
    return each * _FILES


def measure_unlimited(lab: Lab, nbytes: int, rounds: int) -> None:
    """Print a table of all ways between k2a and k2b."""
    size = _make(lab, "k2a", nbytes)
    found = compare(lab, list(WAYS), rounds)
    _say("| way | seconds | MB/s | times rsync | by round | CPU s/GB sending | receiving |")
    _say("| --- | --- | --- | --- | --- | --- | --- |")
    _say("\n".join(rows(found, size, "rsync over ssh")))


def measure_limited(lab: Lab, nbytes: int, rounds: int, megabits: int) -> None:
    """Print the share of a limited link that is used, and the time of a third host."""
    size = _make(lab, "console", nbytes)
    _limit(lab, megabits)
    for way in ("k2 over TLS", "rsync over ssh"):
        times = [measure(lab, WAYS[way], "console").seconds for _ in range(rounds)]
        seconds = statistics.median(times)
        share = size * 8 / seconds / megabits / 1e6
        _say(f"{way}: {seconds:.1f} s at {megabits} Mbit/s, {share:.3f} of the link {times}")
    for nodes in (["k2b"], ["k2a", "k2b"]):
        lab.exec("k2a", ["rm", "-rf", "/tmp/m"])
        one = measure(lab, [*_K2, *nodes], "console")
        _say(f"from the console to {' and '.join(nodes)}: {one.seconds:.1f} s")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--megabits", type=int, default=0, help="limit of the link; 0: none")
    options = parser.parse_args()
    lab = Lab.up(f"speed-{os.getpid()}", 2, tied=True)
    nbytes = int(options.gigabytes * 1e9)
    try:
        if options.megabits:
            measure_limited(lab, nbytes, options.rounds, options.megabits)
        else:
            measure_unlimited(lab, nbytes, options.rounds)
    finally:
        lab.down()


if __name__ == "__main__":
    main()
