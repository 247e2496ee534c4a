"""GPUs of the test machine, as the driver reports them: names, and memory in use over time."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_POLL_SECONDS = 0.1
_CONTEXT_SECONDS = 120.0


def query(fields: str) -> list[list[str]]:
    """Return a row of fields per GPU; empty if nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line]


def count() -> int:
    """Return the number of GPUs; 0 on a machine that computes on its CPU."""
    return len(query("index"))


def machine() -> dict[str, str]:
    """Describe the machine for a row of a table."""
    from importlib.metadata import PackageNotFoundError, version

    gpus = [" ".join(row) for row in query("name,memory.total")]
    found = {
        "gpus": "; ".join(f"{gpu} MiB" for gpu in gpus) or "none",
        "cores": str(psutil.cpu_count()),
        "driver": (query("driver_version") or [[""]])[0][0],
        "date": time.strftime("%Y-%m-%d"),
    }
    for name in ("mlx", "mlx-cuda-13", "mlx-lm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def used_bytes() -> list[int]:
    """Return the memory in use on each GPU, by all programs; 0 where the driver does not tell."""
    return [int(row[0]) * 2**20 if row[0].isdecimal() else 0 for row in query("memory.used")]


@dataclass
class Watch:
    """A thread that notes the most memory seen: per GPU, or resident per process without GPUs.

    A context manager; ``pids`` are processes by name, for machines without a GPU.
    """

    pids: Mapping[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        assert self._thread is not None
        self._thread.join(30)

    def _watch(self) -> None:
        while not self._end.is_set():
            for name, size in self._sizes().items():
                self.most[name] = max(size, self.most.get(name, 0))
            self._end.wait(_POLL_SECONDS)

    def _sizes(self) -> dict[str, int]:
        used = used_bytes()
        if used:
            return {f"gpu {index}": size for index, size in enumerate(used)}
        if any(name.startswith("gpu ") for name in self.most):
            return {}  # the driver did not answer this time
        return {name: _resident(pid) for name, pid in self.pids.items()}


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def context_bytes(python: str, log: Path) -> int:
    """Measure what a CUDA context of MLX takes on a GPU before it holds an array; 0 without GPU."""
    before = used_bytes()
    if not before:
        return 0
    program = (
        "import mlx.core as mx, sys; mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8))); "
        "sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"
    )
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [python, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
    assert process.stdout is not None
    assert process.stdin is not None
    end = threading.Timer(_CONTEXT_SECONDS, process.kill)
    end.start()
    try:
        up = process.stdout.read(2) == b"up"
        now = used_bytes()
    finally:
        end.cancel()
        process.stdin.close()
        process.kill()
        process.wait(30)
        process.stdout.close()
    if not up or len(now) != len(before):
        raise RuntimeError(
            f"MLX did not compute on a GPU: {log.read_text(errors='replace')[-400:]}"
        )
    return max(size - then for size, then in zip(now, before, strict=True))
