"""Writing of files and private folders, errors of disks, and bounded reading of hostile files."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from k2cli.errors import K2Error
from k2cli.settings import folder_variable
from k2cli.units import format_bytes, replace_surrogates

_T = TypeVar("_T")

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
"""Flags of ``open_regular`` to write at the end of a file, which may not be there yet."""


MAX_NAME_BYTES = 255
"""Longest name of a file or folder that file systems allow, without its folders."""

MOST_WRITTEN_BYTES = 2**30
"""Most bytes of one ``pwrite``: macOS refuses 2**31 with EINVAL (tursodatabase/turso#6677), and
Python does not divide them. The experts of one layer of K2 are 2.8 GB."""

_MOST_NOTE_BYTES = 50_000_000

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk, or of a user's share of it, that has no room left."""

DISK_ERRORS = FULL_DISK | {errno.EROFS, errno.EIO, errno.EFBIG}
"""Errors that show the state of a disk, and not a bug."""


def disk_reason(error: OSError, path: Path) -> str:
    """Describe an error of the system, with the free space if the disk is full."""
    reason = error.strerror or str(error)
    if error.errno not in FULL_DISK:
        return reason
    from k2cli.system.disk import disk_use  # slow to import

    try:
        existing = next((each for each in (path, *path.absolute().parents) if each.exists()), path)
        usage = disk_use(existing)
    except OSError:
        return reason
    return f"{reason} ({format_bytes(usage.free)} of {format_bytes(usage.total)} are free)"


def disk_hint(error: OSError, path: Path) -> str | None:
    """Return what to do about an error of the system when ``path`` was written."""
    variable = folder_variable(path)
    elsewhere = f", or set {variable} to a folder on another one" if variable else ""
    match error.errno:
        case errno.ENOSPC:
            return f"make room on the disk (df -h {path.parent}){elsewhere}"
        case errno.EDQUOT:
            return f"make room in your share of the disk (quota -s){elsewhere}"
        case errno.EROFS:
            return f"the disk is mounted for reading only: see mount{elsewhere}"
        case errno.EIO:
            return f"the disk may be damaged: see the system's log{elsewhere}"
        case errno.EFBIG:
            return "the limit on the size of files is too small: ulimit -f unlimited"
        case errno.EISDIR | errno.ELOOP | errno.EINVAL if path.is_symlink() or path.exists():
            if path.is_symlink() or not path.is_file():
                return f"move it away: mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}"
        case _ if variable:
            return f"check the folder, or set {variable} to a folder of yours"
    return None


def unwritable(error: OSError, path: Path, kind: type[K2Error] = K2Error) -> K2Error:
    """Return the error to show for a file or a folder that could not be written.

    Args:
        path: the file as the user knows it; not the temporary file that is written first.
        kind: the class of the error.
    """
    reason = disk_reason(error, path)
    return kind(f"'{path}' cannot be written: {reason}", disk_hint(error, path))


def encode_json(document: Any, *, indent: bool = True) -> bytes:
    """Encode a document for a file or a program, with a final newline.

    Lone surrogates, which stand for the undecodable bytes of a name, have no form in JSON that
    all programs read. They become U+FFFD.
    """
    try:
        data = msgspec.json.encode(document)
    except UnicodeEncodeError:
        data = msgspec.json.encode(_without_surrogates(msgspec.to_builtins(document)))
    return (msgspec.json.format(data, indent=1) if indent else data) + b"\n"


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return replace_surrogates(value)
        case dict():
            return {_without_surrogates(key): _without_surrogates(v) for key, v in value.items()}
        case list() | tuple():
            return [_without_surrogates(each) for each in value]
    return value


def decode_json(data: bytes | str, type: type[_T]) -> _T:
    """Decode JSON from another machine, user or program.

    Raises:
        msgspec.DecodeError: if it is no JSON of that type, no UTF-8, or nested too deeply.
    """
    return decode_with(lambda: msgspec.json.decode(data, type=type))


def decode_with(decode: Callable[[], _T]) -> _T:
    """Call a decoder of msgspec, JSON or MessagePack, so that it raises one kind of error.

    Raises:
        msgspec.DecodeError: if the data have another type or form, or are nested too deeply.
    """
    try:
        return decode()
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from None


def open_regular(
    path: Path, flags: int = os.O_RDONLY, *, follow_links: bool = False, mode: int = 0o666
) -> int:
    """Open a file without waiting for a FIFO, and return its descriptor.

    Args:
        flags: as of ``os.open``; the file is created only with ``O_CREAT``.
        mode: permissions of a file that is created, less the umask.
        follow_links: True for files of the user's own, such as those of the Hub's cache.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, mode)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


class _Versioned(msgspec.Struct, frozen=True):
    schema_version: int = 0


def is_of_later_version(path: Path, version: int) -> bool:
    """True if a later k2 wrote a JSON file: this one must neither read nor replace it.

    Args:
        path: the file, with a field ``schema_version``.
        version: the version that this k2 writes.
    """
    try:
        found = decode_json(read_regular(path, _MOST_NOTE_BYTES, follow_links=True), _Versioned)
    except (OSError, msgspec.DecodeError):
        return False
    return found.schema_version > version


def matching(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder whose names match a pattern, sorted.

    There are none if there is no such folder, also if it is removed at this very moment:
    ``Path.glob`` fails then, before Python 3.13.

    Raises:
        OSError: if the folder cannot be read.
    """
    from fnmatch import filter as names_like

    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names_like(names, pattern))]


def is_same_file(descriptor: int, path: Path) -> bool:
    """True if a path still leads to an open file, such as a lock that others find by its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def is_same_path(one: str | Path, other: str | Path) -> bool:
    """True if two paths lead to the same file or folder, or would if there were any.

    Most volumes of a Mac take ``/Models`` for ``/models``, and ``realpath`` keeps what was typed.
    """
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def read_regular(path: Path, limit_bytes: int, *, follow_links: bool = False) -> bytes:
    """Read a regular file of at most ``limit_bytes``.

    Raises:
        OSError: if it cannot be read, is not a regular file, or is larger.
    """
    with os.fdopen(open_regular(path, follow_links=follow_links), "rb") as file:
        # A read takes as much memory as it asks for, so the limit itself is not asked for.
        expected = max(os.fstat(file.fileno()).st_size, 2**16) + 1
        data = b""
        while len(data) <= limit_bytes and (more := file.read(min(expected, limit_bytes + 1))):
            data = data + more if data else more
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {limit_bytes} bytes", str(path))
    return data


def private_folder(folder: Path) -> Path:
    """Return the absolute path of a folder that only this user can access; make it if need be.

    Raises:
        OSError: if it cannot be made or written, or others made it or can access it.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(f"{folder} must be a folder that only this user can access")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} cannot be written")
    return folder


def read_tail(path: Path, limit_bytes: int) -> bytes:
    """Read the last bytes of a regular file, at most ``limit_bytes``.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - limit_bytes))
        return file.read(limit_bytes)


def name_with(name: str, ending: str) -> str:
    """Return the name of a file beside another: its name and an ending, as far as systems allow.

    A longer name is replaced by a hash of it: file systems allow 255 bytes for a name, and a
    checkpoint's own may already have as many.
    """
    full = f"{name}{ending}"
    if len(os.fsencode(full)) <= MAX_NAME_BYTES:
        return full
    import hashlib  # slow to import

    start = "." if name.startswith(".") else ""
    return f"{start}{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}{ending}"


def write_atomically(path: Path, data: bytes | str, mode: int | None = None) -> None:
    """Replace a file by a complete new one, or leave it unchanged.

    The data go to a temporary file in the same folder, which is then renamed. ``mode`` is set
    regardless of the umask; None gives the default permissions of new files.

    Raises:
        OSError: if the file cannot be written; its ``filename`` is ``path``.
    """
    partial = path.with_name(name_with(f".{path.name}", f".{os.urandom(4).hex()}"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    content = data.encode() if isinstance(data, str) else data
    try:
        descriptor = os.open(partial, flags, 0o666 if mode is None else mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                file.write(content)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        # Writing does not name the file, and nobody knows the temporary one.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes of ``data``, however many, at a place of an open file.

    Raises:
        OSError: if they cannot be written.
    """
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view[:MOST_WRITTEN_BYTES], offset)
        view, offset = view[written:], offset + written


def nameless_file(content: bytes) -> int:
    """Return a descriptor of a file without a name that has this content, at its start.

    On Linux it is in memory: a process that maps a file of a full disk would be killed by SIGBUS.

    Raises:
        OSError: if there is no room for it.
    """
    import tempfile  # slow to import

    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("k2")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    # pwrite leaves the file position at the start; some systems share it with a child.
    try:
        if os.pwrite(descriptor, content, 0) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
