"""The wall clock is set while a run lives: its supervisor is still known."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from k2cli.agent import freshness
from k2cli.agent.activity import is_alive, start_of
from k2cli.agent.locks import (
    FRESH_SECONDS,
    Claim,
    keep_fresh,
    list_locks,
    lock_path,
    release,
    renew,
    take,
)
from k2cli.nodes.local import LocalNode
from k2cli.nodes.locks import renew_locks, take_locks
from k2cli.runs.record import list_runs, read_record, save_record
from tests.runs.test_record import make_record

OWN = os.getpid()
STEP_SECONDS = 3600.0


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let psutil see what it sees after the wall clock was set forward by an hour."""
    true = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda own: true(own) + STEP_SECONDS)
    if sys.platform != "linux":
        pytest.skip("the start of a process does not move on macOS")


def _created() -> float:
    return psutil.Process().create_time()


def test_a_live_run_stays_live(request: pytest.FixtureRequest) -> None:
    record = replace(make_record(), pid_start=start_of(OWN))
    save_record(record)
    request.getfixturevalue("stepped")
    assert list_runs() == [record]


def test_the_holder_of_a_lock_stays_its_holder(request: pytest.FixtureRequest) -> None:
    here = [LocalNode()]
    take_locks(here, "demo-1", {})
    request.getfixturevalue("stepped")
    assert [lock.state for lock in list_locks(lambda run: 0)] == ["held"]
    renew_locks(here, "demo-1")
    claim = msgspec.json.decode(lock_path("demo-1").read_bytes(), type=Claim)
    assert (claim.pid, claim.pid_start) == (OWN, start_of(OWN))
    assert [lock.state for lock in list_locks(lambda run: 0)] == ["held"]


def test_the_holder_of_a_lock_stays_its_holder_when_the_host_has_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Mac takes the name that the network has for its address (tailscale/tailscale#4003)."""
    take_locks([LocalNode()], "demo-1", {})
    monkeypatch.setattr(freshness, "age_seconds", lambda lock: 2 * FRESH_SECONDS)
    monkeypatch.setattr(socket, "gethostname", lambda: "client-100-34-5-1")
    assert [lock.state for lock in list_locks(lambda run: 0)] == ["held"]
    claim = msgspec.json.decode(lock_path("demo-1").read_bytes(), type=Claim)
    gone = msgspec.structs.replace(claim, pid_start=f"{claim.pid_start}0")
    lock_path("demo-1").write_bytes(msgspec.json.encode(gone))
    assert [lock.state for lock in list_locks(lambda run: 0)] == ["stale"]


def test_another_process_with_the_same_id_is_not_the_supervisor() -> None:
    boot, _, ticks = start_of(OWN).partition(" ")
    assert is_alive(OWN, _created(), start_of(OWN))
    assert not is_alive(OWN, _created(), f"{boot} {int(ticks or 0) + 1}")
    assert not is_alive(OWN, _created(), f"other-boot {ticks}")


def test_an_ended_process_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    start = start_of(child.pid)
    assert child.stdout is not None
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid, 0.0, start)  # a zombie
    child.wait()
    child.stdout.close()
    assert not is_alive(child.pid, 0.0, start)
    with pytest.raises(psutil.NoSuchProcess):
        start_of(child.pid)


def test_records_and_locks_of_earlier_versions_are_understood() -> None:
    record = make_record()
    path = record.folder / "run.json"
    fields = msgspec.json.decode(path.read_bytes())
    del fields["pid_start"]
    path.write_bytes(msgspec.json.encode(fields))
    assert read_record(record.folder) == record
    assert list_runs() == [record]
    assert is_alive(OWN, _created())
    assert not is_alive(OWN, _created() - 5)
    _write_old_claim(lock_path("old-1"))
    assert [lock.state for lock in list_locks(lambda run: 0)] == ["held"]
    assert renew("old-1", OWN, _created())
    assert [lock.state for lock in list_locks(lambda run: 0)] == ["held"]


def _write_old_claim(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        msgspec.json.encode(
            {
                "run_id": "old-1",
                "user": "jane",
                "host": socket.gethostname(),
                "pid": OWN,
                "pid_create_time": _created(),
            }
        )
    )


@pytest.fixture
def far_lock() -> Path:
    """The lock of a run whose supervisor is on another machine, just taken."""
    take(Claim("far-1", "jane", "laptop", 1, 0.0), lambda run: 0, share=False)
    return lock_path("far-1")


def _state() -> str:
    (lock,) = list_locks(lambda run: 0)
    return lock.state


def test_a_lock_of_another_machine_s_run_stays_fresh(
    far_lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + STEP_SECONDS)
    assert _state() == "held"
    keep_fresh("far-1")
    assert _state() == "held"


def test_a_lock_that_is_not_renewed_gets_old_even_if_the_clock_was_set_back(
    far_lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: true() + FRESH_SECONDS + 1)
    os.utime(far_lock, (time.time() + STEP_SECONDS,) * 2)
    assert _state() == "stale"


def test_a_lock_of_an_earlier_boot_is_stale(far_lock: Path) -> None:
    far_lock.with_suffix(".renewed").write_text("another boot")
    assert _state() == "stale"


def test_a_lock_of_an_earlier_version_is_judged_by_the_wall_clock(far_lock: Path) -> None:
    far_lock.with_suffix(".renewed").unlink()
    assert _state() == "held"
    os.utime(far_lock, (time.time() - FRESH_SECONDS - 1,) * 2)
    assert _state() == "stale"


def test_no_mark_outlives_its_lock(far_lock: Path) -> None:
    far_lock.with_name("old-1.renewed").touch()
    release("far-1")
    take(Claim("far-2", "jane", "laptop", 1, 0.0), lambda run: 0, share=False)
    assert {path.name for path in far_lock.parent.glob("*.*")} == {
        ".mutex",
        "far-2.json",
        "far-2.renewed",
    }


def test_on_macos_the_start_is_the_one_that_the_kernel_keeps(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue("stepped")
    shown = psutil.Process().create_time()
    with monkeypatch.context() as patch:
        patch.setattr("k2cli.agent.activity.sys.platform", "darwin")
        start = start_of(OWN)
        assert is_alive(OWN, shown, start)
        assert not is_alive(OWN, shown, f"{start}1")
    assert abs(float(start) - shown) > STEP_SECONDS / 2
