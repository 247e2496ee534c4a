"""The timer that ends a rank on a system whose kernel does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

# A rank of such a system whose guard is gone or silent, as far as this link shows.
RANK = """
import ctypes, socket, sys, time
from k2cli.protocol import Deadlines
from k2cli.rank.guard_link import GuardLink
ours, theirs = socket.socketpair()
link = GuardLink(ours.detach())
link._has_timer = True
link.start_listening(Deadlines(initialisation=0.5, liveness=1.5))
time.sleep(0.2)
if sys.argv[1] == "joined":
    link.end_timer()
    print("joined", flush=True)
    time.sleep(2.5)
    print("alive", flush=True)
else:
    print("joining", flush=True)
    ctypes.PyDLL(None).sleep(60)  # holds the GIL
"""


def rank(state: str) -> subprocess.Popen[str]:
    started = subprocess.Popen([sys.executable, "-c", RANK, state], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == f"{state}\n"
    return started


def test_a_rank_that_holds_the_gil_ends_and_one_that_was_stopped_goes_on() -> None:
    joining, joined = rank("joining"), rank("joined")
    joined.send_signal(signal.SIGSTOP)
    assert joining.wait(30) == 1
    time.sleep(2.5)  # longer than the timer that ended the other
    joined.send_signal(signal.SIGCONT)
    assert joined.communicate(timeout=30)[0] == "alive\n"
    assert joined.returncode == 0
    joining.communicate()
