"""Memory of a process on macOS: the footprint, which its resident memory may be far from."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from k2cli.agent.activity import activity
from k2cli.agent.software import _processes
from k2cli.settings import RUN_OPTION
from k2cli.system import memory_use
from k2cli.system.memory_use import MacUse, memory_of, use_on_macos
from tests.support.as_macos import on_macos

FOOTPRINT = 7 * 2**40
RUN = "demo-macos-2"


def test_what_is_compressed_and_what_a_gpu_has_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = psutil.Process()
    program = "import time; print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, RUN_OPTION, RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()

            def use(pid: int) -> MacUse | None:
                return MacUse(1, FOOTPRINT, 2) if pid == process.pid else None

            monkeypatch.setattr(memory_use, "use_on_macos", use)
            with on_macos():
                assert memory_of(psutil.Process(process.pid)) == FOOTPRINT
                assert 0 < memory_of(own) < FOOTPRINT  # what psutil says, if that is not told
                [run] = [run for run in activity().runs if run.run_id == RUN]
                assert run.resident_bytes == FOOTPRINT
                assert next(u.resident_bytes for u in _processes() if u.run_id == RUN) == FOOTPRINT
            if sys.platform != "darwin":
                assert memory_of(psutil.Process(process.pid)) < FOOTPRINT
        finally:
            process.kill()


def test_a_process_that_is_gone_has_no_use() -> None:
    assert use_on_macos(2**22 + 1) is None
