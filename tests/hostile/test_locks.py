"""Hostile contents of the lock folder, which all users of a machine share."""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2cli.agent import locks
from k2cli.agent.clean import clean_machine
from k2cli.agent.locks import Claim, list_locks, lock_path, release, renew, take
from k2cli.settings import locks_directory, state_directory

LIMIT_SECONDS = 10.0


def in_time(call: Callable[[], Any]) -> Any:
    """Return the result of a call that must not hang."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(LIMIT_SECONDS)
    assert results, "it hangs, or has failed"
    return results[0]


def no_processes(run_id: str) -> int:
    return 0


def claim(run_id: str = "demo-1", host: str = "laptop") -> Claim:
    return Claim(run_id, "jane", host, 1, 0.0)


def planted(name: str, data: bytes) -> Path:
    folder = locks_directory()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o1777)
    (folder / name).write_bytes(data)
    return folder / name


def stale(path: Path) -> None:
    os.utime(path, (time.time() - 1000,) * 2)


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    content = json.dumps({"run_id": "demo-1", "user": "", "host": "", "pid": 1,
                          "pid_create_time": 0.0}).encode()  # fmt: skip
    victim = tmp_path / "demo-1.json"
    victim.write_bytes(content)
    victim.chmod(0o600)
    locks_directory().mkdir(parents=True)
    locks_directory().chmod(0o1777)
    lock_path("demo-1").symlink_to(victim)
    assert not renew("demo-1", 2, 0.0)
    assert list_locks(no_processes) == []
    assert take(claim(), no_processes, share=False).taken
    release("demo-1")
    assert victim.read_bytes() == content
    assert victim.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", [".mutex", "demo-1.json", "other-1.json"])
def test_a_fifo_in_the_folder_delays_nobody(name: str) -> None:
    planted("note", b"")
    os.mkfifo(locks_directory() / name)
    if name != ".mutex":
        assert in_time(lambda: take(claim(), no_processes, share=False)).taken
        return
    with pytest.raises(OSError, match=r"not a regular file; repair it with: sudo rm .*\.mutex"):
        list_locks(no_processes)


def test_a_link_in_place_of_the_mutex_is_refused(tmp_path: Path) -> None:
    planted("note", b"")
    (tmp_path / "victim").touch(mode=0o600)
    (locks_directory() / ".mutex").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="sudo rm"):
        list_locks(no_processes)
    assert (tmp_path / "victim").stat().st_mode & 0o777 == 0o600


def test_another_name_of_a_private_file_as_the_mutex_does_not_open_the_file(tmp_path: Path) -> None:
    planted("note", b"")
    victim = locks_directory().parent / "victim"
    victim.touch(mode=0o600)
    (locks_directory() / ".mutex").hardlink_to(victim)
    list_locks(no_processes)
    assert victim.stat().st_mode & 0o777 == 0o600


def test_the_holder_of_the_mutex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert locks.MUTEX_SECONDS <= 5
    monkeypatch.setattr(locks, "MUTEX_SECONDS", 0.1)
    list_locks(no_processes)
    path = locks_directory() / ".mutex"
    who = rf"process {os.getpid()} \(" if Path("/proc/locks").exists() else "lsof"
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"{re.escape(str(path))} has been locked .*{who}"):
            in_time_or_raise()
    assert list_locks(no_processes) == []


def in_time_or_raise() -> None:
    """List the locks in a thread, and raise the error of the thread here."""

    def call() -> OSError | None:
        try:
            list_locks(no_processes)
        except OSError as error:
            return error
        return None

    if (error := in_time(call)) is not None:
        raise error


def test_a_folder_without_the_sticky_bit_is_refused() -> None:
    planted("note", b"")
    locks_directory().chmod(0o777)
    with pytest.raises(OSError, match=f"sudo chmod 1777 {locks_directory()}"):
        take(claim(), no_processes, share=False)
    locks_directory().chmod(0o755)  # another process that has just made it
    assert take(claim(), no_processes, share=False).taken


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    state_directory().mkdir(parents=True, exist_ok=True)
    locks_directory().symlink_to(tmp_path)
    with pytest.raises(OSError, match=f"not a folder; repair it with: sudo rm {locks_directory()}"):
        take(claim(), no_processes, share=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run_id", ["../victim", "..", "/etc/x", "-x", "other-2", "", "a\n", "a/b"])
def test_a_lock_that_names_another_run_removes_nothing(run_id: str) -> None:
    victim = state_directory() / "victim.json"
    document = {"run_id": run_id, "user": "u", "host": "far", "pid": 1, "pid_create_time": 0.0}
    stale(planted("other-1.json", json.dumps(document).encode()))
    victim.write_bytes(b"mine")
    assert take(claim(), no_processes, share=False).removed == ()
    clean_machine(frozenset())
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"null", b"\xff\xfe", b"[" * 60_000, b'{"x":' * 10_000, b" " * 2**17,
        b"\0" * 100,
        b'{"run_id":"\xff"}',
        b'{"run_id":"other-1","user":"u","host":"HOST","pid":-5,"pid_create_time":0}',
        b'{"run_id":"other-1","user":"u","host":"HOST","pid":1e300,"pid_create_time":1e400}',
        b'{"run_id":"other-1","user":"u","host":"HOST","pid":%d,"pid_create_time":0}' % 2**63,
        b'{"run_id":"other-1","user":"u","host":"HOST","pid":%d,"pid_create_time":0}' % 2**200,
    ],
)  # fmt: skip
def test_a_damaged_lock_does_not_stop_a_launch(data: bytes) -> None:
    stale(planted("other-1.json", data.replace(b"HOST", os.uname().nodename.encode())))
    assert in_time(lambda: take(claim(), no_processes, share=False)).taken
    assert [lock.claim.run_id for lock in list_locks(no_processes)] == ["demo-1"]
