"""The folder of the prefix cache on disk: what is in it, and removing of it.

``prefixes/STORE-RANK/SCOPE/BLOCK`` in k2's cache folder. A store belongs to one model, placement,
float type and set of versions, a scope to one key; all names are digests. The names depend on a
secret of the folder of the leader's machine, so that they tell nothing about the tokens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_json, open_regular, private_folder, read_regular, write_atomically
from k2cli.settings import cache_directory
from k2cli.system.disk import disk_use

SECRET_NAME = "secret"
PART_MARK = ".part-"
"""Part of the name of a block that is not complete."""
BLOCK_TOKENS = 256
_NOTE_NAME = "store.json"
_LOCK_NAME = "lock"
_SECRET_BYTES = 32
_LOCK_TRIES, _LOCK_SECONDS = 100, 0.01
_OPEN_TRIES = 10
"""Attempts to make a file in a folder that others remove meanwhile: several runs may start."""


@dataclass(frozen=True, slots=True)
class BlockFile:
    """A block of a store: its name there (scope and block), size, and time of its last use."""

    name: str
    nbytes: int
    used: float


class StoreNote(msgspec.Struct, frozen=True):
    """Note of a rank about its store: the name of the model, and the rank's number."""

    model: str = ""
    rank: int = 0
    ranks: int = 0


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A store: whose it is as far as known, what it has, and if a run uses it."""

    folder: Path
    model: str
    rank: int
    ranks: int
    tokens: int
    nbytes: int
    used: float
    in_use: bool

    @property
    def is_empty(self) -> bool:
        """True if it holds nothing, and no run uses it: its run has stored nothing.

        The next run that keeps caches on this disk removes it.
        """
        return not self.nbytes and not self.in_use


class PrefixRoom(msgspec.Struct, frozen=True):
    """Room of the disk with all stores: its free bytes, and those that each rank number holds."""

    folder: str
    free_bytes: int
    held_bytes: dict[int, int]


def prefixes_directory() -> Path:
    """Return the folder of all stores; it may not be there."""
    return cache_directory() / "prefixes"


def open_prefixes_directory() -> Path:
    """Make the folder of all stores, which only this user can access, and return it.

    Raises:
        OSError: if it cannot be made or written, or others can access it.
    """
    return private_folder(prefixes_directory())


def naming_secret(known: bytes = b"") -> bytes:
    """Return the secret of this machine's folder; make it if there is none.

    Runs that start at the same time get the same.

    Args:
        known: the secret to make, for a run that has one; else it is random.

    Raises:
        OSError: if it cannot be read or written.
    """
    for _ in range(_OPEN_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):  # ``k2 cache clear`` has removed it just now
            return _kept_secret(known)
    return _kept_secret(known)


def _kept_secret(known: bytes) -> bytes:
    path = open_prefixes_directory() / SECRET_NAME
    with contextlib.suppress(FileNotFoundError):
        secret = read_regular(path, _SECRET_BYTES)
        if len(secret) == _SECRET_BYTES:
            return secret
        path.unlink(missing_ok=True)  # a full disk or a machine that stopped has cut it short
    fresh = path.with_name(f".{SECRET_NAME}-{os.urandom(4).hex()}")
    write_atomically(fresh, known or os.urandom(_SECRET_BYTES), 0o600)
    try:
        os.link(fresh, path)
    except FileExistsError:  # another run was first: its secret counts for both
        pass
    except OSError:  # some file systems have no links
        fresh.rename(path)
    finally:
        fresh.unlink(missing_ok=True)
    return read_regular(path, _SECRET_BYTES)


def blocks_of(store: Path) -> Iterator[BlockFile]:
    """Yield the files of a store, complete or not; links and other kinds are left out."""
    for scope in _entries(store):
        if not scope.is_dir(follow_symlinks=False):
            continue
        for entry in _entries(Path(scope.path)):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    name = f"{scope.name}/{entry.name}"
                    yield BlockFile(name, found.st_size, found.st_mtime)


def change_times(folders: Iterable[Path]) -> dict[str, int]:
    """Return when a block was last added to or removed from each scope of stores."""
    found = {}
    for folder in folders:
        for scope in _entries(folder):
            with contextlib.suppress(FileNotFoundError):
                found[scope.path] = scope.stat(follow_symlinks=False).st_mtime_ns
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def stores() -> list[StoreFolder]:
    """List the stores, those of the most recently used model first, and each by its ranks.

    Folders of other names are left out: they are not of k2, and what is listed may be removed.

    Raises:
        K2Error: if something else than a folder is in its place. Behind a link may be any folders.
        OSError: if the folder is there and cannot be read.
    """
    found = []
    root = prefixes_directory()
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        kind = "a link" if root.is_symlink() else "no folder"
        error = f"'{root}' is {kind}, and k2 keeps no caches of prompts there"
        raise K2Error(error, f"ls -ld {shlex.quote(str(root))}")
    for entry in _entries(root):
        is_store = entry.name.rpartition("-")[2].isdecimal() and "-" in entry.name
        if is_store and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):  # removed at this very moment
                found.append(_described(Path(entry.path)))
    last: dict[str, float] = {}
    for store in found:
        last[_run_name(store)] = max(store.used, last.get(_run_name(store), 0.0))
    return sorted(found, key=lambda store: (-last[_run_name(store)], _run_name(store), store.rank))


def _described(folder: Path) -> StoreFolder:
    made = folder.stat().st_mtime
    files = list(blocks_of(folder))
    note = StoreNote()
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        note = decode_json(read_regular(folder / _NOTE_NAME, 2**16), StoreNote)
    used = max((file.used for file in files), default=made)
    size = sum(file.nbytes for file in files)
    tokens = sum(PART_MARK not in file.name for file in files) * BLOCK_TOKENS
    where = (note.model, note.rank, note.ranks)
    return StoreFolder(folder, *where, tokens, size, used, _is_used(folder))


def _run_name(store: StoreFolder) -> str:
    """Return the part of a folder's name that the stores of all ranks have in common."""
    return store.folder.name.rpartition("-")[0]


def prefix_room() -> PrefixRoom:
    """Return the room on this machine's disk, and what each rank number holds already.

    Raises:
        OSError: if the disk or the folder cannot be examined.
    """
    folder = prefixes_directory()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    held: dict[int, int] = {}
    for entry in _entries(folder):
        rank = entry.name.rpartition("-")[2]
        if rank.isdecimal() and entry.is_dir(follow_symlinks=False):
            size = sum(file.nbytes for file in blocks_of(Path(entry.path)))
            held[int(rank)] = held.get(int(rank), 0) + size
    return PrefixRoom(str(folder), disk_use(existing).free, held)


def open_store(folder: Path, note: StoreNote) -> int:
    """Make a store's folder and its note; return a descriptor that marks it as used.

    If nobody else uses the store, blocks that are not complete are removed: those who wrote them
    were killed.

    Raises:
        OSError: if it cannot be made or written, or others can access it.
    """
    lock = -1
    for tries_left in reversed(range(_OPEN_TRIES)):
        try:
            lock = _make_store(folder, note)
            break
        except FileNotFoundError:  # it was empty, and another run has removed it just now
            if not tries_left:
                raise
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in blocks_of(folder):
            if PART_MARK in file.name:
                (folder / file.name).unlink(missing_ok=True)
    _mark_used(lock)
    return lock


def _make_store(folder: Path, note: StoreNote) -> int:
    private_folder(folder)
    write_atomically(folder / _NOTE_NAME, msgspec.json.encode(note), 0o600)
    return open_regular(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, mode=0o600)


def _mark_used(lock: int) -> None:
    """Share a store's lock; others have it alone for moments only, while they look."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_SECONDS)
        except OSError:  # some network file systems have no locks
            return
        else:
            return


def lock_state(folder: Path) -> os.stat_result:
    """Return the state of a store's lock file.

    Raises:
        FileNotFoundError: if the store is not there.
    """
    return (folder / _LOCK_NAME).stat(follow_symlinks=False)


def _is_used(folder: Path) -> bool:
    try:
        lock = open_regular(folder / _LOCK_NAME)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(lock)
    return False


def remove_store(folder: Path) -> None:
    """Remove a store and all its blocks, as far as nobody else removes it at this moment.

    It gets another name first, so that a run that uses it does not write into it meanwhile.

    Raises:
        OSError: if something of it cannot be removed.
    """
    removed = folder.with_name(f"{os.urandom(4).hex()}-{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(removed)
        shutil.rmtree(removed, onerror=_raise_unless_gone)


def _raise_unless_gone(
    _: object, path: str, failure: tuple[type[BaseException], BaseException, object]
) -> None:
    """Raise the error of a file that cannot be removed, with its whole path."""
    error = failure[1]
    if not isinstance(error, OSError):
        raise error
    if not isinstance(error, FileNotFoundError):
        raise OSError(error.errno, error.strerror, path) from error


def remove_if_empty(folder: Path) -> None:
    """Remove a store that holds nothing, unless a run uses it, or that cannot be known.

    A run that opens it meanwhile finds that it was removed, as beside ``remove_store``.
    """
    with contextlib.suppress(OSError), os.fdopen(open_regular(folder / _LOCK_NAME)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if next(blocks_of(folder), None) is None:
            remove_store(folder)


def remove_secret() -> None:
    """Remove the secret: blocks on other machines are never found again, and give way to others."""
    (prefixes_directory() / SECRET_NAME).unlink(missing_ok=True)
