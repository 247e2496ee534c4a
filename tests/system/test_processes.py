"""Processes of others that psutil cannot describe, as happens on macOS."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from k2cli.agent.activity import activity
from k2cli.agent.run_processes import kill_run, processes_of_run
from k2cli.agent.software import _processes
from k2cli.guard.mpi_slot_process import _guard_is_here
from k2cli.guard.work import _compilers
from k2cli.settings import RUN_OPTION
from k2cli.system.processes import variable_of
from k2cli.tools.processes import kill_marked
from tests.support.as_macos import break_command_lines, on_macos

RUN = "demo-macos-1"


def test_a_process_that_cannot_be_described_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    break_command_lines(monkeypatch)
    program = "import time; print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, RUN_OPTION, RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert [found.pid for found in processes_of_run(RUN)] == [process.pid]
            assert RUN in [run.run_id for run in activity().runs]
            assert process.pid in [use.pid for use in _processes() if use.run_id == RUN]
            assert not _guard_is_here(RUN, 0)
            assert kill_run(RUN) == []
        finally:
            process.kill()


def test_an_environment_that_cannot_be_read_has_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    def environ(process: psutil.Process) -> dict[str, str]:
        raise SystemError("<built-in function proc_environ> returned a result with an exception")

    monkeypatch.setattr(psutil.Process, "environ", environ)
    assert variable_of(psutil.Process(), "PATH") is None
    kill_marked("no-such-mark")


def test_the_compiler_of_metal_is_found_under_the_name_that_the_system_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = psutil.Process(os.getpid())
    monkeypatch.setattr(psutil, "process_iter", lambda: iter([own]))
    # 16 characters, if psutil may not read its command line.
    monkeypatch.setattr(psutil.Process, "name", lambda process: "MTLCompilerServi")
    with on_macos():
        assert own in _compilers(own)
