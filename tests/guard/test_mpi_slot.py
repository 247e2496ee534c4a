"""A slot stays as long as its guard lives, and takes mpirun with it soon after."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from k2cli.agent.openmpi import find_mpirun
from k2cli.guard import mpi_slot_process
from k2cli.settings import RUN_OPTION

# The slot as it is, with shorter waits than its 20 s: nobody else ends it where launcher and guard
# were killed while a run starts.
SLOT = """
from k2cli.guard import mpi_slot_process as slot
slot._LOOK_SECONDS, slot._LIMIT_SECONDS = 0.2, 1.0
slot.main()
"""
LONGER_THAN_THE_LIMIT_SECONDS = 2.5


def test_mpirun_and_seat_outlive_their_guard_by_the_limit_only() -> None:
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("needs mpirun")
    run = f"mpi-slot-{os.getpid()}"
    # What a guard shows of itself to a slot that looks for it, and no more.
    guard = subprocess.Popen(
        [sys.executable, "-c", "input()", RUN_OPTION, run, "--rank", "0", "--bootstrap"],
        stdin=subprocess.PIPE,
    )
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    slot = [sys.executable, "-c", SLOT, RUN_OPTION, run, "--rank", "0"]
    job = subprocess.Popen(
        [mpirun, *root, "-np", "1", *slot],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        time.sleep(LONGER_THAN_THE_LIMIT_SECONDS)
        assert job.poll() is None, job.communicate()[0]
        guard.kill()
        output, _ = job.communicate(timeout=20)
    finally:
        guard.kill()
        guard.communicate()
        if job.poll() is None:
            job.kill()
            job.communicate()
    assert job.returncode == 1
    assert "no guard listens for the slot of rank 0" in output


def test_a_slot_whose_guard_ends_as_it_connects_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Exited(Exception):
        pass

    def exited(status: int) -> None:
        raise Exited(status)

    ours, theirs = socket.socketpair()
    theirs.close()
    monkeypatch.setattr(mpi_slot_process, "_connect", lambda *run: ours)
    monkeypatch.setattr(mpi_slot_process.os, "_exit", exited)
    monkeypatch.setattr(mpi_slot_process.signal, "signal", lambda *ignored: None)
    monkeypatch.setattr(sys, "argv", ["slot", RUN_OPTION, "demo-1", "--rank", "0"])
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with ours, pytest.raises(Exited, match="0"):
        mpi_slot_process.main()
