"""Locks of this machine: one file per run that uses it, written by the run's launcher.

A run has a machine to itself, unless the next run asks to share it and the memory of both fits. On
a machine with GPUs it has its GPUs to itself: runs on different GPUs do not disturb each other.
A lock is stale if no process of its run is left here and the run has ended: its supervisor, if it
ran on this machine, has ended; if it ran on another one, the lock was not renewed for a minute
(guards renew it every fifteen seconds while they hear from their supervisor).
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from k2cli.agent import freshness
from k2cli.agent.activity import is_alive
from k2cli.files import decode_json, matching, open_regular, read_regular, write_atomically
from k2cli.pauses import Deadline
from k2cli.settings import is_run_id, locks_directory

FRESH_SECONDS = 60.0
MUTEX_SECONDS = 5.0
_POLL_SECONDS = 0.02
_LIMIT_BYTES = 64 * 1024
State = Literal["held", "stale", "left over"]


class DeviceClaim(msgspec.Struct, frozen=True):
    """The part of a claim on one GPU: its name for people, and bytes as in ``Claim``."""

    uuid: str
    label: str
    bytes: int
    limit_bytes: int


class Claim(msgspec.Struct, frozen=True):
    """Content of a lock file. ``pid`` is the supervisor's on ``host``; bytes are the plan's.

    ``devices`` are the GPUs that the run uses; empty if it uses no GPU, or k2 did not choose it.
    ``model`` is the reference of the launch and ``folder`` that of the model here, both "" in a
    claim of an earlier version.
    """

    run_id: str
    user: str
    host: str
    pid: int
    pid_create_time: float
    bytes: int = 0
    limit_bytes: int = 0
    created: float = 0.0
    pid_start: str = ""
    devices: tuple[DeviceClaim, ...] = ()
    model: str = ""
    folder: str = ""


class Lock(msgspec.Struct, frozen=True):
    """A claim and its state; ``left over``: the run has ended, but has processes here."""

    claim: Claim
    state: State


class LockAnswer(msgspec.Struct, frozen=True):
    """Result of a claim: the other runs on the machine, or on the same GPUs if the run uses GPUs,
    and runs whose stale lock was removed."""

    taken: bool
    holders: tuple[Lock, ...] = ()
    removed: tuple[str, ...] = ()


def lock_path(run_id: str) -> Path:
    """Return the path of a run's lock file."""
    return locks_directory() / f"{run_id}.json"


def _checked_folder() -> Path:
    """Return the locks folder, made if needed, in which no user can replace another one's file.

    Raises:
        OSError: if the folder cannot be used; the message names the command that repairs it.
    """
    folder = locks_directory()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        # Like /tmp: all users may write, and none may remove another user's file.
        folder.mkdir(0o1777)
        folder.chmod(0o1777)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is not a folder; repair it with: sudo rm {folder}")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise OSError(
            f"in {folder}, users can replace the files of others: its mode lacks the sticky bit; "
            f"repair it with: sudo chmod 1777 {folder}"
        )
    return folder


def _open_mutex(path: Path) -> int:
    try:
        return open_regular(path, os.O_RDWR)
    except FileNotFoundError:
        with suppress(FileExistsError):  # another process was faster
            os.fchmod(created := os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), 0o666)
            return created
        return open_regular(path, os.O_RDWR)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{path}: {why}; repair it with: sudo rm {path}") from error


@contextmanager
def _mutex() -> Iterator[Path]:
    """Hold the mutex of the locks folder against all processes of all users; yields the folder.

    Raises:
        OSError: if another process holds it for ``MUTEX_SECONDS``, or the folder cannot be used.
    """
    folder = _checked_folder()
    path = folder / ".mutex"
    descriptor = _open_mutex(path)
    try:
        limit = Deadline(MUTEX_SECONDS)
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if limit.has_passed:
                holder = _holder(os.fstat(descriptor)) or f"a process that 'lsof {path}' names"
                raise OSError(f"{path} has been locked for {MUTEX_SECONDS:.0f} s by {holder}")
            time.sleep(_POLL_SECONDS)
        yield folder
    finally:
        os.close(descriptor)


def _holder(mutex: os.stat_result) -> str | None:
    """Describe the process that holds the mutex; None if the system does not tell."""
    device = f"{os.major(mutex.st_dev):02x}:{os.minor(mutex.st_dev):02x}:{mutex.st_ino}"
    with suppress(OSError, ValueError, psutil.Error):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if "->" not in words and words[1] == "FLOCK" and words[5] == device:
                process = psutil.Process(int(words[4]))
                return f"process {process.pid} ({process.name()}) of {process.username()}"
    return None


def lock_state(age_seconds: float, alive: bool, processes: int, *, here: bool) -> State:
    """Decide whether a lock is held, stale, or left by an ended run that has processes here.

    Args:
        age_seconds: time since the lock was renewed.
        alive: True if its supervisor is alive; used only if ``here``.
        processes: number of processes of the run on this machine.
        here: True if the supervisor is, or was, a process of this machine.
    """
    if (here and alive) or (not here and age_seconds < FRESH_SECONDS):
        return "held"
    return "left over" if processes else "stale"


def _read_claim(path: Path) -> Claim:
    """Read a lock file, which another user may have made.

    Raises:
        OSError: if it is not the lock of the run that its name tells.
    """
    try:
        claim = decode_json(read_regular(path, _LIMIT_BYTES), type=Claim)
    except msgspec.DecodeError as error:
        raise OSError(f"{path} is not a lock: {error}") from error
    if claim.run_id != path.stem or not is_run_id(claim.run_id):
        raise OSError(f"{path} is the lock of another run")
    return claim


def _read(path: Path, count: Callable[[str], int]) -> Lock | None:
    try:
        claim = _read_claim(path)
        age = freshness.age_seconds(path)
        if age is None:
            age = _age_by_wall_clock(path.lstat().st_mtime)
    except OSError:
        return None
    # A Mac's host name may have changed since. No process of another machine has such a start.
    known = claim.host == socket.gethostname()
    alive = (known or claim.pid_start != "") and is_alive(
        claim.pid, claim.pid_create_time, claim.pid_start
    )
    here = known or alive
    return Lock(claim, lock_state(age, alive, count(claim.run_id), here=here))


def _age_by_wall_clock(renewed: float) -> float:
    """Return the age of a lock of an earlier version of k2, or of an earlier boot."""
    return time.time() - renewed if renewed > psutil.boot_time() else FRESH_SECONDS + 1


def _locks(folder: Path, count: Callable[[str], int]) -> list[Lock]:
    found = (_read(path, count) for path in matching(folder, "*.json"))
    return [lock for lock in found if lock is not None]


def _write(path: Path, claim: Claim) -> None:
    write_atomically(path, msgspec.json.encode(claim), 0o644)
    freshness.begin(path)


def list_locks(count: Callable[[str], int]) -> list[Lock]:
    """Read all locks of this machine; ``count`` counts the processes of a run here."""
    with _mutex() as folder:
        return _locks(folder, count)


def take(claim: Claim, count: Callable[[str], int], *, share: bool) -> LockAnswer:
    """Lock this machine for a run, if no other run has it or both may share it.

    A second claim by the same run, which knows this machine under two names, adds its bytes.
    """
    with _mutex() as folder:
        freshness.remove_lonely(folder)
        locks = _locks(folder, count)
        own = [lock.claim for lock in locks if lock.claim.run_id == claim.run_id]
        others = [lock for lock in locks if lock.claim.run_id != claim.run_id]
        removed = []
        for lock in others:
            if lock.state == "stale":
                with suppress(OSError):  # another user's, which the folder's mode protects
                    lock_path(lock.claim.run_id).unlink()
                    freshness.remove(lock_path(lock.claim.run_id))
                removed.append(lock.claim.run_id)
        holders = tuple(
            lock for lock in others if lock.state != "stale" and _overlap(claim, lock.claim)
        )
        if holders and not (share and _fits(claim, holders)):
            return LockAnswer(False, holders, tuple(removed))
        if own:
            claim = msgspec.structs.replace(
                claim,
                bytes=claim.bytes + own[0].bytes,
                devices=_added(claim.devices, own[0].devices),
            )
        _write(lock_path(claim.run_id), claim)
        return LockAnswer(True, holders, tuple(removed))


def _overlap(one: Claim, other: Claim) -> bool:
    """True if two runs use the same memory: the machine's, or that of a GPU."""
    if not one.devices or not other.devices:
        return True
    return not {part.uuid for part in one.devices}.isdisjoint(part.uuid for part in other.devices)


def _added(some: tuple[DeviceClaim, ...], more: tuple[DeviceClaim, ...]) -> tuple[DeviceClaim, ...]:
    """Merge the claims of one run: bytes on the same GPU are added up."""
    merged = {part.uuid: part for part in some}
    for part in more:
        before = merged.get(part.uuid)
        size = part.bytes + (before.bytes if before is not None else 0)
        merged[part.uuid] = msgspec.structs.replace(part, bytes=size)
    return tuple(merged.values())


def _fits(claim: Claim, holders: tuple[Lock, ...]) -> bool:
    if claim.devices and all(lock.claim.devices for lock in holders):
        return all(
            part.bytes + sum(bytes_on(lock.claim, part.uuid) for lock in holders)
            <= part.limit_bytes
            for part in claim.devices
        )
    return claim.bytes + sum(lock.claim.bytes for lock in holders) <= claim.limit_bytes


def bytes_on(claim: Claim, uuid: str) -> int:
    """Return the bytes that a run has claimed on a GPU."""
    return sum(part.bytes for part in claim.devices if part.uuid == uuid)


def renew(run_id: str, pid: int, create_time: float, start: str = "") -> bool:
    """Renew a run's lock and store its present supervisor; False if it has no lock here."""
    with _mutex():
        path = lock_path(run_id)
        try:
            claim = _read_claim(path)
        except OSError:
            return False
        owner = {"pid": pid, "pid_create_time": create_time, "pid_start": start}
        _write(path, msgspec.structs.replace(claim, **owner))
        return True


def release(run_id: str) -> None:
    """Remove a run's lock on this machine."""
    with _mutex():
        lock_path(run_id).unlink(missing_ok=True)
        freshness.remove(lock_path(run_id))


def keep_fresh(run_id: str) -> None:
    """Show that a run still uses this machine. Needs no mutex, and no space on the disk.

    Raises:
        OSError: if it has no lock here, or that is another user's.
    """
    freshness.renew(lock_path(run_id))
