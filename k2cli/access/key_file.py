"""The file of the named keys, which every command and every supervisor of this user reads.

It holds digests and no keys, and is nobody else's business all the same: it shows who may do what.
So a file that others can read or write, a link, and a file that this version does not understand
are refused, and never replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from k2cli.access.keys import checked_name, digest_of, make_key, make_key_id
from k2cli.errors import K2Error, UsageError
from k2cli.files import (
    decode_json,
    encode_json,
    open_regular,
    private_folder,
    read_regular,
    unwritable,
    write_atomically,
)
from k2cli.pauses import Deadline
from k2cli.protocol import KeyLimits, NamedKey
from k2cli.settings import config_directory
from k2cli.units import MIB, one_line

SCHEMA_VERSION = 1
MAX_KEYS = 256
"""Keys in the file. All of them go in one message to a guard, and each request tries them all."""

_LIMIT_BYTES = MIB
_LOCK_SECONDS = 10.0
_POLL_SECONDS = 0.02
Stamp = tuple[int, ...] | None
"""The identity of a file's content, by which a change is noticed; None if there is no file."""


class _Version(msgspec.Struct, frozen=True):
    """The member that files of all versions have."""

    schema_version: int


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: keys in the order in which they were made."""

    schema_version: int
    keys: list[NamedKey]


def key_file() -> Path:
    """Return the path of the file, which may not exist."""
    return config_directory() / "access" / "keys.json"


def read_keys() -> list[NamedKey]:
    """Read the named keys; none if there is no file.

    Raises:
        K2Error: if the file cannot be read, others can access it, it is damaged, or a newer k2 has
            written it.
    """
    path = key_file()
    try:
        _check_access(path)
        data = read_regular(path, _LIMIT_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        reason = error.strerror or str(error)
        raise K2Error(f"the keys in {path} cannot be read: {reason}", _aside(path)) from error
    return _decoded(data, path)


def key_file_stamp() -> Stamp:
    """Return the identity of the file's content, without reading it.

    Raises:
        OSError: if the file cannot be asked about.
    """
    try:
        found = os.lstat(key_file())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)


def create_key(
    name: str,
    limits: KeyLimits,
    expires_seconds: float | None = None,
    *,
    monitors: bool = False,
) -> tuple[NamedKey, str]:
    """Make a key of a new name, and store its digest.

    Args:
        name: of the person or program that gets it.
        limits: what it may do.
        expires_seconds: time from now until it expires; None is never.
        monitors: let it read the status and the metrics of runs.

    Returns:
        The stored key, and the key itself, which nobody can find out later.

    Raises:
        UsageError: if the name cannot be one, or has a key.
        K2Error: if the file cannot be used.
    """
    checked_name(name)
    secret, now = make_key(), time.time()
    expires = None if expires_seconds is None else now + expires_seconds
    digest = digest_of(secret.encode())
    key = NamedKey(name, make_key_id(), digest, now, expires, limits, monitors)
    with _locked_file() as path:
        keys = read_keys()
        if any(each.name == name for each in keys):
            raise UsageError(
                f"there is a key '{name}' already",
                f"choose another name, or end the use of that key: k2 keys revoke {name}",
            )
        _write(path, [*keys, key])
    return key, secret


def revoke_key(name: str) -> NamedKey:
    """Remove the key of a name, and return what was stored of it.

    Raises:
        UsageError: if the name has no key.
        K2Error: if the file cannot be used.
    """
    with _locked_file() as path:
        keys = read_keys()
        revoked = next((key for key in keys if key.name == name), None)
        if revoked is None:
            known = ", ".join(key.name for key in keys)
            hint = f"known keys: {known}" if known else "there is none: k2 keys list"
            raise UsageError(f"there is no key '{one_line(name)}'", hint)
        _write(path, [key for key in keys if key is not revoked])
    return revoked


@contextlib.contextmanager
def _locked_file() -> Iterator[Path]:
    path = key_file()
    folder = _checked_folder(path.parent)
    with _locked(folder / "keys.lock"):
        yield path


def _write(path: Path, keys: Sequence[NamedKey]) -> None:
    if len(keys) > MAX_KEYS:
        raise UsageError(
            f"there are {MAX_KEYS} named keys already, and there can be no more",
            "k2 keys list, then k2 keys revoke NAME",
        )
    try:
        write_atomically(path, encode_json(_Content(SCHEMA_VERSION, list(keys))), 0o600)
    except OSError as error:
        raise unwritable(error, path) from error


def _checked_folder(folder: Path) -> Path:
    try:
        return private_folder(folder)
    except OSError as error:
        if error.errno is not None:
            raise unwritable(error, folder) from error
        quoted = shlex.quote(str(folder))
        raise K2Error(
            str(error), f"see who can: ls -ld {quoted}; then chmod 700 {quoted}"
        ) from None


def _check_access(path: Path) -> None:
    """Check who can reach the file.

    Raises:
        OSError: if there is none.
        K2Error: if it is a link, another user's, or can be read or written by others.
    """
    quoted = shlex.quote(str(path))
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise K2Error(f"{path} is a link, and the keys must be a file of their own", f"rm {quoted}")
    if found.st_uid != os.geteuid():
        raise K2Error(f"{path} belongs to another user", f"sudo chown {os.geteuid()} {quoted}")
    if found.st_mode & 0o077:
        raise K2Error(
            f"others can access {path}: its mode is {stat.S_IMODE(found.st_mode):04o}",
            f"chmod 600 {quoted}",
        )


def _decoded(data: bytes, path: Path) -> list[NamedKey]:
    try:
        version = decode_json(data, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise K2Error(
                f"{path} was written by a newer k2 (schema {version})",
                "update k2 on this machine, as it was installed",
            )
        content = decode_json(data, type=_Content)
    except msgspec.DecodeError as error:
        raise K2Error(f"{path} is damaged: {error}", _aside(path)) from error
    if len(content.keys) > MAX_KEYS:
        raise K2Error(f"{path} has more than {MAX_KEYS} keys", _aside(path))
    return content.keys


def _aside(path: Path) -> str:
    quoted, old = shlex.quote(str(path)), shlex.quote(f"{path}.old")
    return f"put it aside, and make the keys again: mv {quoted} {old}; k2 keys create NAME"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, mode=0o600)
    except OSError as error:
        raise unwritable(error, path) from error
    try:
        limit = Deadline(_LOCK_SECONDS)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if limit.has_passed:
                    raise K2Error(
                        f"another process has held {path} for {_LOCK_SECONDS:.0f} s",
                        f"see which one: lsof {shlex.quote(str(path))}",
                    ) from None
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)
