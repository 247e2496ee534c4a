"""Clocks that leave out the pauses of their own process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from k2cli import event_loop
from k2cli.nodes.node import run_process
from k2cli.pauses import INTERVAL_SECONDS, Deadline, PauseAwareClock

STOPPED_SECONDS = 3.0


class Time:
    """A clock of the system that shows what the test says."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.clock = PauseAwareClock(lambda: self.seconds)

    def after(self, seconds: float) -> float:
        self.seconds += seconds
        return self.clock.now()


def test_a_clock_counts_a_pause_as_one_interval() -> None:
    system = Time()
    assert system.after(0.5) == 100.5
    assert system.after(3600.0) == 100.5 + INTERVAL_SECONDS
    assert system.after(0.5) == 101.0 + INTERVAL_SECONDS
    assert system.clock.paused_seconds == 3600.0 - INTERVAL_SECONDS


def test_a_deadline_passes_after_its_time_and_no_pause_shortens_it() -> None:
    system = Time()
    limit = Deadline(2.0, system.clock)
    system.after(100.0)
    assert not limit.has_passed
    assert limit.next_wait() == INTERVAL_SECONDS
    for _ in range(7):
        system.after(0.25)
    assert limit.has_passed
    assert limit.next_wait() == 0.0


# Waits for something that never comes, once in asyncio and once in a blocking call. It stops itself
# once it waits, and tells how often its clock was read after it was continued.
WAITS = """
import asyncio, os, signal, socket, sys, threading, time
from k2cli import event_loop, pauses
from k2cli.protocol.wire import ConnectionLost, authenticate
readings, continued = 0, False
def read():
    global readings
    readings += continued
    return time.monotonic()
def stop():
    global continued
    os.kill(os.getpid(), signal.SIGSTOP)
    continued = True
clock = pauses.PauseAwareClock(read)
event_loop.PauseAwareClock = lambda: clock
async def wait():
    asyncio.get_running_loop().call_later(0.3, stop)
    try:
        async with asyncio.timeout(2.0):
            await asyncio.Event().wait()
    except TimeoutError:
        print(readings, flush=True)
if sys.argv[1] == "asyncio":
    event_loop.run(wait())
else:
    ours, theirs = socket.socketpair()
    threading.Timer(0.3, stop).start()
    try:
        authenticate(ours, "5e" * 32, accepting=True, timeout_seconds=2.0, clock=clock)
    except ConnectionLost:
        print(readings, flush=True)
"""


@pytest.mark.parametrize(("kind", "otherwise"), [("asyncio", 4), ("blocking", 1)])
def test_a_process_that_was_stopped_still_waits_for_its_peers(kind: str, otherwise: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, kind], stdout=subprocess.PIPE, text=True
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(STOPPED_SECONDS)
    process.send_signal(signal.SIGCONT)
    # Each reading counts a second at most. With a clock that counts pauses there are so few.
    assert int(process.communicate(timeout=60)[0]) > otherwise


def test_a_loop_that_waits_long_for_input_has_not_paused() -> None:
    async def wait() -> float:
        loop = asyncio.get_running_loop()
        began, real = loop.time(), time.monotonic()
        reader, writer = os.pipe()
        loop.call_later(1.6, os.write, writer, b"x")
        arrived = asyncio.Event()
        loop.add_reader(reader, arrived.set)
        await arrived.wait()
        loop.remove_reader(reader)
        for descriptor in (reader, writer):
            os.close(descriptor)
        return (loop.time() - began) / (time.monotonic() - real)

    assert event_loop.run(wait()) > 0.5


def test_a_command_gets_its_whole_input_in_slices_of_time() -> None:
    script = "import sys, time; time.sleep(0.7); print(len(sys.stdin.buffer.read()))"
    done = run_process([sys.executable, "-c", script], b"x" * 2**20, 20.0, "here")
    assert (done.status, done.stdout) == (0, b"1048576\n")
