"""Stopping a run that a detached launch hands over to its supervisor at this very moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest

from k2cli.errors import ClusterError
from k2cli.runs import hand_over, stop
from k2cli.runs.hand_over import deciding
from k2cli.runs.record import read_record, save_record
from k2cli.supervisor import start
from k2cli.supervisor.start import launch_detached
from k2cli.supervisor.supervisor import supervise
from tests.runs.test_record import make_record


@contextmanager
def _process() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_process_that_takes_the_run_over_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_record("starting")
    with _process() as launcher, _process() as supervisor:
        record = replace(
            record, pid=launcher.pid, pid_create_time=psutil.Process(launcher.pid).create_time()
        )
        save_record(record)
        kill, told = os.kill, []

        def hand_over(pid: int, number: int) -> None:
            told.append((pid, signal.Signals(number).name))
            if pid == launcher.pid:
                created = psutil.Process(supervisor.pid).create_time()
                save_record(replace(record, pid=supervisor.pid, pid_create_time=created))
            kill(pid, number)

        monkeypatch.setattr(stop.os, "kill", hand_over)
        report = stop.stop_run(record)
        assert report.state == "stopped"
        assert told == [(launcher.pid, "SIGTERM"), (supervisor.pid, "SIGTERM")]
        assert supervisor.wait(10) == -signal.SIGTERM


def test_sigterm_ends_a_detached_launch_together_with_the_supervisor_that_it_has_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = make_record("starting")
    with _process() as supervisor:

        def wait_until_ready(*run: object) -> None:
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGTERM)  # that of ``k2 stop``
            signal.pause()

        monkeypatch.setattr(start, "_start_supervisor", lambda folder: supervisor)
        monkeypatch.setattr(start, "_wait_until_ready", wait_until_ready)
        said: list[bool] = []
        with pytest.raises(KeyboardInterrupt):
            launch_detached(record, lambda event: None, said.append)
        assert supervisor.wait(10) == -signal.SIGTERM
    assert said == [True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_supervisor_does_not_begin_a_run_that_was_stopped_before_it() -> None:
    record = make_record("stopped")
    with pytest.raises(ClusterError, match=f"{record.run_id} is over: stopped"):
        supervise(record.folder, lambda event: None)
    assert read_record(record.folder) == record


def test_a_run_that_is_taken_over_once_its_launcher_has_ended_is_stopped_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = replace(make_record("starting"), pid=2**22 + 1)
    save_record(record)
    with _process() as supervisor:
        own = psutil.Process(supervisor.pid)
        taken_over = replace(record, pid=own.pid, pid_create_time=own.create_time())
        release = stop.release_locks

        def too_late(*locks: Any) -> None:
            release(*locks)
            if own.is_running() and own.status() != psutil.STATUS_ZOMBIE:
                save_record(taken_over)

        monkeypatch.setattr(stop, "release_locks", too_late)
        assert stop.stop_run(record).state == "stopped"
        assert supervisor.wait(10) == -signal.SIGTERM
    latest = read_record(record.folder)
    assert latest is not None
    assert latest.state == "stopped"


def test_what_is_decided_about_a_run_is_decided_by_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record, order = make_record(), list[str]()

    def decide() -> None:
        with deciding(record.folder):
            order.append("other")

    other = threading.Thread(target=decide)
    with deciding(record.folder):
        other.start()
        other.join(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "other"]
    monkeypatch.setattr(hand_over, "_MOST_SECONDS", 0.1)
    with deciding(record.folder), deciding(record.folder), deciding(record.folder / "gone"):
        pass
