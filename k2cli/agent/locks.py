"""The locks of one machine: which runs have it, as files that each run's launcher leaves there.

A run that has a machine has it to itself, unless the next one asks to share it and the memory of
both fits. A lock is stale if its run is provably gone: its supervisor, if that was a process of
this machine; else if nothing of the run has shown a sign of life for a minute (guards do every
fifteen seconds, as long as they hear from their launcher) and no process of it is here.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from k2cli.agent.activity import is_alive
from k2cli.files import write_atomically
from k2cli.settings import locks_directory

FRESH_SECONDS = 60.0
State = Literal["held", "stale", "left over"]


class Claim(msgspec.Struct, frozen=True):
    """One run's lock. ``pid`` is its supervisor's, a process of ``host``; bytes are the plan's."""

    run_id: str
    user: str
    host: str
    pid: int
    pid_create_time: float
    bytes: int = 0
    limit_bytes: int = 0
    created: float = 0.0


class Lock(msgspec.Struct, frozen=True):
    """A claim as it is found; ``left over``: its run is gone, but processes of it are here."""

    claim: Claim
    state: State


class LockAnswer(msgspec.Struct, frozen=True):
    """Whether the lock was taken, who has the machine, and whose stale locks were removed."""

    taken: bool
    holders: tuple[Lock, ...] = ()
    removed: tuple[str, ...] = ()


def lock_path(run_id: str) -> Path:
    """The file of one run."""
    return locks_directory() / f"{run_id}.json"


@contextmanager
def _alone() -> Iterator[Path]:
    """Nobody else on this machine, of any user, looks at the locks meanwhile."""
    folder = locks_directory()
    if not folder.is_dir():
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            # As /tmp is: for all users, and none may remove another's.
            folder.chmod(0o1777)
    path = folder / ".mutex"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with suppress(PermissionError):
            os.fchmod(descriptor, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def judge(claim: Claim, age_seconds: float, alive: bool, processes: int, *, here: bool) -> State:
    """What a lock is worth.

    Args:
        claim: what it says.
        age_seconds: since the run's last sign of life here.
        alive: whether its supervisor lives; counts only if it is a process of this machine.
        processes: of the run, on this machine.
        here: whether the supervisor is, or was, a process of this machine.
    """
    if (here and alive) or (not here and age_seconds < FRESH_SECONDS):
        return "held"
    return "left over" if processes else "stale"


def _read(path: Path, count: Callable[[str], int]) -> Lock | None:
    try:
        claim = msgspec.json.decode(path.read_bytes(), type=Claim)
        renewed = path.stat().st_mtime
    except (OSError, msgspec.MsgspecError):
        return None
    here = claim.host == socket.gethostname()
    alive = here and is_alive(claim.pid, claim.pid_create_time)
    age = time.time() - renewed if renewed > psutil.boot_time() else FRESH_SECONDS + 1
    return Lock(claim, judge(claim, age, alive, count(claim.run_id), here=here))


def _locks(folder: Path, count: Callable[[str], int]) -> list[Lock]:
    found = (_read(path, count) for path in sorted(folder.glob("*.json")))
    return [lock for lock in found if lock is not None]


def _write(path: Path, claim: Claim) -> None:
    write_atomically(path, msgspec.json.encode(claim), 0o644)


def list_locks(count: Callable[[str], int]) -> list[Lock]:
    """All locks of this machine; ``count`` tells how many processes of a run are here."""
    with _alone() as folder:
        return _locks(folder, count)


def take(claim: Claim, count: Callable[[str], int], *, share: bool) -> LockAnswer:
    """Take this machine for a run, if it can be had.

    A second claim of the same run, which knows this machine by two names, adds its bytes.
    """
    with _alone() as folder:
        locks = _locks(folder, count)
        own = [lock.claim for lock in locks if lock.claim.run_id == claim.run_id]
        others = [lock for lock in locks if lock.claim.run_id != claim.run_id]
        removed = []
        for lock in others:
            if lock.state == "stale":
                with suppress(OSError):  # another user's, whose removal the folder forbids
                    lock_path(lock.claim.run_id).unlink()
                removed.append(lock.claim.run_id)
        holders = tuple(lock for lock in others if lock.state != "stale")
        if holders and not (share and _fits(claim, holders)):
            return LockAnswer(False, holders, tuple(removed))
        if own:
            claim = msgspec.structs.replace(claim, bytes=claim.bytes + own[0].bytes)
        _write(lock_path(claim.run_id), claim)
        return LockAnswer(True, holders, tuple(removed))


def _fits(claim: Claim, holders: tuple[Lock, ...]) -> bool:
    return claim.bytes + sum(lock.claim.bytes for lock in holders) <= claim.limit_bytes


def renew(run_id: str, pid: int, create_time: float) -> bool:
    """A sign of life, and who supervises the run now; False if the run has no lock here."""
    with _alone():
        path = lock_path(run_id)
        try:
            claim = msgspec.json.decode(path.read_bytes(), type=Claim)
        except (OSError, msgspec.MsgspecError):
            return False
        _write(path, msgspec.structs.replace(claim, pid=pid, pid_create_time=create_time))
        return True


def release(run_id: str) -> None:
    """Give this machine back."""
    with _alone():
        lock_path(run_id).unlink(missing_ok=True)
