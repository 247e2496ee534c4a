"""Records of the kernel about a process that it killed because memory was short.

Linux counts such kills for each control group and writes each one into its log. macOS writes a
report for every "jetsam event". The parsers are functions of text and are tested with published
text. ``OomEvidence`` reads the records of this machine, the node of the rank, when the rank dies.
If no record can be read, no cause is reported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.files import decode_json, read_regular
from k2cli.pauses import Deadline
from k2cli.units import KIB, MIB, format_bytes

# "Out of memory: Killed process 7 (python) total-vm:9kB, anon-rss:5kB, …": one line since Linux
# 5.0. Earlier versions began the line with "Killed process".
_KILLED = re.compile(
    r"(?P<why>.*?)[Kk]illed process (?P<pid>\d{1,18}) \((?P<name>.*)\),? (?P<sizes>.*)"
)
_RESIDENT = re.compile(r"(?:anon|file|shmem)-rss:(\d{1,18})kB")
# A record of /dev/kmsg is "level,sequence,microseconds,flags;text": Documentation/ABI/testing.
_KMSG_PREFIX = re.compile(r"^\d{1,18},\d{1,18},\d{1,18},[^;]*;")
# Reasons of macOS's memorystatus that are not about memory.
_OTHER_REASONS = frozenset({"vnode-limit", "idle-exit"})
_REPORT_FOLDERS = (
    Path("/Library/Logs/DiagnosticReports"),
    Path(os.path.expanduser("~/Library/Logs/DiagnosticReports")),
)
_MOST_REPORT_BYTES = 32 * MIB
_MOST_RESIDENT_BYTES = 2**60
# PROC_PID_INIT_INO of the kernel, whose log has the process ids of this namespace.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_JOURNAL_SECONDS = 2.0
_POLL_SECONDS = 0.1
# Linux sends the signal before it writes its line; macOS writes its report some time later.
_LINUX_PATIENCE_SECONDS = 1.0
_MACOS_PATIENCE_SECONDS = 3.0
_LEAST_PATIENCE_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class OutOfMemoryKill:
    """A process that the kernel killed. ``why`` names the shortage, or is the kernel's own word."""

    pid: int
    name: str
    resident_bytes: int
    why: str

    def __str__(self) -> str:
        parts = (self.name, f"{format_bytes(self.resident_bytes)} resident", self.why)
        return f"the kernel killed pid {self.pid} ({', '.join(filter(None, parts))})"


# --- parsers ------------------------------------------------------------------------------------


def find_in_log(lines: Iterable[str], pid: int) -> OutOfMemoryKill | None:
    """Find the kill of a process in lines of Linux' kernel log, with any prefix."""
    for line in lines:
        found = _KILLED.match(line)
        if found and int(found["pid"]) == pid:
            resident = sum(int(size) for size in _RESIDENT.findall(found["sizes"])) * KIB
            return OutOfMemoryKill(pid, found["name"], resident, _shortage(found["why"]))
    return None


def _shortage(text: str) -> str:
    if "cgroup out of memory" in text:
        return "its control group was at its limit"
    return "the machine had none left" if "Out of memory" in text else ""


def find_in_jetsam_report(text: str, pid: int) -> OutOfMemoryKill | None:
    """Find the kill of a process in macOS's JetsamEvent report.

    A report is a line of JSON and a JSON document. Only processes that were killed have a
    ``reason``. The result is None for text that is no such report.
    """
    head, _, body = text.partition("\n")
    try:
        report = decode_json(body if body.strip() else head, type=dict[str, Any])
        page_bytes = report["memoryStatus"]["pageSize"]
        processes = [entry for entry in report["processes"] if entry.get("pid") == pid]
        for entry in processes:
            reason = entry.get("reason")
            if reason and reason not in _OTHER_REASONS:
                resident = int(entry.get("rpages", 0)) * int(page_bytes)
                if not 0 <= resident < _MOST_RESIDENT_BYTES:
                    return None
                return OutOfMemoryKill(pid, str(entry.get("name", "")), resident, str(reason))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return None


def counted_kills(text: str) -> int | None:
    """Read ``oom_kill`` from ``memory.events`` (cgroup v2) or ``memory.oom_control`` (v1)."""
    found = re.search(r"^oom_kill (\d{1,18})$", text, re.MULTILINE)
    return int(found[1]) if found else None


def counter_file(membership: str, root: Path = Path("/sys/fs/cgroup")) -> Path | None:
    """Return the path of the file that counts kills, from the text of ``/proc/PID/cgroup``."""
    unified = None
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return root / "memory" / path.lstrip("/") / "memory.oom_control"
        if not controllers:
            unified = root / path.lstrip("/") / "memory.events"
    return unified


# --- reading ------------------------------------------------------------------------------------


class OomEvidence:
    """Evidence of kills since it was made. Make it before a process starts, use it at the end."""

    def __init__(self) -> None:
        self._began = time.time()
        # By name, because their times follow a clock that may be set.
        self._old_reports = frozenset(_report_paths()) if sys.platform == "darwin" else frozenset()
        self._log = _open_log() if sys.platform == "linux" else None
        self._kills = _count()

    def close(self) -> None:
        """Close the kernel's log."""
        if self._log is not None:
            os.close(self._log)
            self._log = None

    @property
    def has_counted_kill(self) -> bool:
        """True if the kernel has since killed a process of this control group."""
        return self._kills is not None and (_count() or 0) > self._kills

    def find_kill(self, pid: int, *, suspected: bool) -> OutOfMemoryKill | None:
        """Find the kernel's record of the kill of a process.

        Args:
            pid: in the namespace of this process.
            suspected: there is other evidence of a kill, so wait for the record, 3 s at most.
        """
        if sys.platform == "linux" and not _is_first_pid_namespace():
            return None
        patience = _LINUX_PATIENCE_SECONDS if sys.platform == "linux" else _MACOS_PATIENCE_SECONDS
        limit = Deadline(patience if suspected else _LEAST_PATIENCE_SECONDS)
        while True:
            found = self._look(pid)
            if found is not None or limit.has_passed:
                return found
            time.sleep(_POLL_SECONDS)

    def _look(self, pid: int) -> OutOfMemoryKill | None:
        if sys.platform == "darwin":
            reports = (find_in_jetsam_report(text, pid) for text in _reports(self._old_reports))
            return next((kill for kill in reports if kill is not None), None)
        if self._log is not None:
            return find_in_log(_new_lines(self._log), pid)
        return find_in_log(_journal(self._began), pid)


def _count() -> int | None:
    with suppress(OSError, ValueError):
        path = counter_file(Path("/proc/self/cgroup").read_text())
        return counted_kills(path.read_text()) if path is not None else None
    return None


def _is_first_pid_namespace() -> bool:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    return False


def _open_log() -> int | None:
    """Open the kernel's log at its end; None if this user may not read it."""
    with suppress(OSError):
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(log, 0, os.SEEK_END)
        return log
    return None


def _new_lines(log: int) -> Iterator[str]:
    while True:
        try:
            record = os.read(log, 8192)
        except BrokenPipeError:
            continue  # older records were overwritten; the next read returns the oldest one left
        except OSError:
            return  # no more records
        yield _KMSG_PREFIX.sub("", record.decode(errors="replace").splitlines()[0])


def _journal(since: float) -> list[str]:
    """Read the kernel's log from the journal, if there is one."""
    command = ["journalctl", "-k", "-q", "--no-pager", "-o", "short-unix", f"--since=@{since:.0f}"]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_JOURNAL_SECONDS
        )
        return done.stdout.decode(errors="replace").splitlines()
    return []


def _report_paths() -> list[Path]:
    found: list[Path] = []
    for folder in _REPORT_FOLDERS:
        with suppress(OSError):
            found += folder.glob("JetsamEvent-*.ips")
    return found


def _reports(old: Collection[Path]) -> Iterator[str]:
    """Read the JetsamEvent reports that are not among the old ones, newest first.

    A name ends in the time of the event; the report of a kill names its process.
    """
    for path in sorted(set(_report_paths()) - set(old), reverse=True):
        with suppress(OSError):
            yield read_regular(path, _MOST_REPORT_BYTES).decode(errors="replace")
