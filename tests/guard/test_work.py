"""Signs of work that a guard sees from outside: of real processes, and of macOS's counters."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from k2cli.guard.watchdog import NO_WORK, Work
from k2cli.guard.work import Counters, WorkProbe, work_between
from k2cli.system.memory_use import MacUse, parse_use

_PROGRAMS = {
    "waits": "time.sleep(60)",
    "polls": "while True: pass",
    "touches": "while True:\n with mmap.mmap(-1, 2**20) as m: m.write(bytes(2**20))",
    "reads": "while True: open(sys.executable, 'rb').read(2**20); time.sleep(0.01)",
    "compiles": "subprocess.run([sys.executable, '-S', '-c', 'while True: pass'])",
    "masks": "subprocess.run([sys.executable, '-S', '-c', 'while True: pass', '--k2-run', 'x'])",
}


def _work_of(program: str, expected: Callable[[Work], bool], within_seconds: float = 30.0) -> Work:
    """Look at a process until there is what is expected, or until the time is up."""
    text = f"import mmap, subprocess, sys, time; print(flush=True)\n{_PROGRAMS[program]}"
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.3)
            probe = WorkProbe(process.pid, 0.4)
            until = time.monotonic() + within_seconds
            assert probe.look(time.monotonic()) == NO_WORK
            while True:
                time.sleep(0.5)
                work = probe.look(time.monotonic())
                if expected(work) or time.monotonic() > until:
                    return work
        finally:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()


@pytest.mark.parametrize(
    ("program", "sign"),
    [
        ("touches", "memory was touched for the first time"),
        pytest.param("reads", "files were read or written", marks=pytest.mark.skipif(
            sys.platform != "linux", reason="macOS counts the disk, and this file is in memory")),
        ("compiles", "compilers ran"),
    ],
)  # fmt: skip
def test_a_process_that_works_shows_it(program: str, sign: str) -> None:
    assert sign in _work_of(program, lambda work: bool(work.signs)).signs


@pytest.mark.parametrize("program", ["waits", "masks", "polls"])
def test_waiting_shows_nothing_or_processor_time_alone(program: str) -> None:
    work = _work_of(program, lambda work: work.computes, 30.0 if program == "polls" else 1.5)
    assert work == Work(computes=program == "polls")


def test_a_process_that_is_gone_shows_no_work() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        probe = WorkProbe(process.pid, 0.0)
        probe.look(0.0)
    assert probe.look(1.0) == NO_WORK


def test_weights_that_metal_wires_are_work() -> None:
    numbers = list(range(18))
    numbers[5], numbers[7], numbers[16], numbers[17] = 10, 20, 300, 400
    assert parse_use(struct.pack("=16s18Q", bytes(16), *numbers)) == MacUse(10, 20, 700)
    before, after = Counters(held_bytes=0), Counters(held_bytes=2**30)
    assert work_between(before, after, 1.0).signs == ("its memory grew",)
    assert work_between(before, after, 1000.0) == NO_WORK
