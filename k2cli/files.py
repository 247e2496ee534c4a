"""Atomic writing of files, private folders, and bounded reading of files that may be hostile."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Decoder(Protocol[_T_co]):
    """A decoder of msgspec, of JSON or of msgpack."""

    def decode(self, buf: bytes, /) -> _T_co:
        """Decode one document."""
        ...


def decode_json(data: bytes | str, type: type[_T]) -> _T:
    """Decode JSON from another machine, user or program.

    Raises:
        msgspec.DecodeError: if it is no JSON of that type, no UTF-8, or nested too deeply.
    """
    try:
        return msgspec.json.decode(data, type=type)
    except (RecursionError, UnicodeDecodeError) as error:
        raise _decode_error(error) from None


def decode_with(decoder: Decoder[_T], data: bytes) -> _T:
    """Decode a message of another process.

    Raises:
        msgspec.DecodeError: if it is no such message, no UTF-8, or nested too deeply.
    """
    try:
        return decoder.decode(data)
    except (RecursionError, UnicodeDecodeError) as error:
        raise _decode_error(error) from None


def _decode_error(error: RecursionError | UnicodeDecodeError) -> msgspec.DecodeError:
    """Return msgspec's own kind of error for one that it lets through."""
    too_deep = isinstance(error, RecursionError)
    return msgspec.DecodeError("it is nested too deeply" if too_deep else str(error))


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow_links: bool = False) -> int:
    """Open a file without waiting for a FIFO or creating the file, and return its descriptor.

    Args:
        follow_links: True for files of the user's own, such as those of the Hub's cache.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_regular(path: Path, limit_bytes: int, *, follow_links: bool = False) -> bytes:
    """Read a regular file of at most ``limit_bytes``.

    Raises:
        OSError: if it cannot be read, is not a regular file, or is larger.
    """
    with os.fdopen(open_regular(path, follow_links=follow_links), "rb") as file:
        data = file.read(limit_bytes + 1)
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


def write_atomically(path: Path, data: bytes | str, mode: int | None = None) -> None:
    """Replace a file by a complete new one, or leave it unchanged.

    The data go to a temporary file in the same folder, which is then renamed. ``mode`` is set
    regardless of the umask; None gives the default permissions of new files.

    Raises:
        OSError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o666 if mode is None else mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(descriptor, mode)
            file.write(data.encode() if isinstance(data, str) else data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
