"""Start, pin, stop, continue, inspect and end the processes of the two programs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

START_LIMIT_SECONDS = 180.0


def environment(added: dict[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without k2's settings."""
    return {k: v for k, v in os.environ.items() if not k.startswith("K2_")} | (added or {})


def start(
    arguments: Sequence[str],
    log: Path,
    added_environment: dict[str, str] | None = None,
    **options: object,
) -> subprocess.Popen[bytes]:
    """Start a program whose output goes into ``log``."""
    with log.open("ab") as output:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            list(arguments),
            env=environment(added_environment),
            stderr=output,
            **{"stdin": subprocess.DEVNULL, "stdout": output} | options,  # type: ignore[call-overload]
        )
        return process


def wait_until(
    condition: Callable[[], bool], what: str, processes: Iterable[subprocess.Popen[bytes]] = ()
) -> None:
    """Poll until the condition holds.

    Raises:
        RuntimeError: if a process ends first, or the time is up.
    """
    watched = list(processes)
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while not condition():
        if ended := [process for process in watched if process.poll() is not None]:
            raise RuntimeError(f"waiting for {what}: it exited with {ended[0].returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"waiting for {what}: nothing after {START_LIMIT_SECONDS:.0f} s")
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Return True if a process listens on a port of the loopback address."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(pid: int, rank: int, cores_per_node: int = 1) -> None:
    """Pin all threads of a process to the cores of its rank, if the system supports it."""
    available = cores()
    if available:
        first = rank * cores_per_node
        chosen = {available[(first + n) % len(available)] for n in range(cores_per_node)}
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), chosen)


def prefer(pid: int, niceness: int) -> None:
    """Put the scheduling group (Linux: the session) of a process before those of others.

    Ranks wait for one another by spinning. On a machine with other work each wait may last until
    the other side has a core again, so that what is measured is the other work.
    """
    group = Path(f"/proc/{pid}/autogroup")
    if niceness and group.exists():
        group.write_text(str(niceness))


def reset_preference(pid: int) -> None:
    """Reset the priority of a scheduling group."""
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text("0")


def hold(pids: Iterable[int]) -> None:
    """Stop processes (SIGSTOP), so that they use no CPU while the other side is measured."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)


def let_go(pids: Iterable[int]) -> None:
    """Continue stopped processes (SIGCONT)."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def end(pids: Iterable[int]) -> None:
    """End processes and their children by pid, and wait until they are gone."""
    found: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(found, timeout=15)
    if alive:
        raise RuntimeError(f"still alive: {[process.pid for process in alive]}")


def bytes_read(pid: int) -> int:
    """Return the bytes that a process has read so far; 0 on systems without /proc."""
    path = Path(f"/proc/{pid}/io")
    return _field(path, "rchar") if path.exists() else 0


def peak_resident_bytes(pid: int) -> int:
    """Return the peak resident memory of a process; 0 on systems without /proc."""
    path = Path(f"/proc/{pid}/status")
    return _field(path, "VmHWM") * 1024 if path.exists() else 0


@dataclass(frozen=True, slots=True)
class BareProgram:
    """Cost of importing a program's modules."""

    bytes_read: int
    peak_resident_bytes: int


def bare_program(*modules: str) -> BareProgram:
    """Measure the cost of importing modules, in a process of its own."""
    code = (
        f"import {', '.join(modules)}, os, sys; from benchmarks import processes as p; "
        "sys.stdout.write(f'{p.bytes_read(os.getpid())} {p.peak_resident_bytes(os.getpid())}')"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment({"PYTHONPATH": root}),
        capture_output=True,
        text=True,
        timeout=START_LIMIT_SECONDS,
        check=True,
    )
    read, peak = done.stdout.split()[-2:]
    return BareProgram(int(read), int(peak))


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return 0
