"""Hashes of checkpoint files: the one place that reads files through them.

The Hub names contents by SHA-256, or by git's SHA-1 for small files. hashlib releases Python's
interpreter lock, so threads compute hashes on all cores.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from k2cli.files import open_regular

_READ_BYTES = 2**20
_SHA256_LETTERS = 64

OnBytes = Callable[[int], None]
"""Function that is called with the length of each piece that was read."""


class Digest(Protocol):
    """Hash in progress, as hashlib makes it."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add the next bytes."""

    def digest(self) -> bytes:
        """Return the hash of all bytes so far."""

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far, as lower-case hex."""


def new_sha256() -> Digest:
    """Begin a SHA-256."""
    return hashlib.sha256()


def new_digest(content_hash: str, nbytes: int) -> Digest:
    """Begin a hash of the kind of another one: SHA-256, or git's SHA-1 of a content.

    Args:
        content_hash: the hash that the content shall have, as hex.
        nbytes: length of the content, which is part of git's hash.
    """
    if len(content_hash) == _SHA256_LETTERS:
        return new_sha256()
    # git's own name of the content; it guards against damage, not against an attacker
    return hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)


def read_into(
    digest: Digest, descriptor: int, first: int, length: int, on_bytes: OnBytes = lambda count: None
) -> int:
    """Add a range of an open file to a hash, and return how many bytes it had.

    Raises:
        OSError: if the file cannot be read.
        Exception: what ``on_bytes`` raises, which ends the reading.
    """
    buffer = memoryview(bytearray(min(_READ_BYTES, max(length, 1))))
    done = 0
    while done < length:
        count = os.preadv(descriptor, [buffer[: min(length - done, len(buffer))]], first + done)
        if count == 0:
            break
        digest.update(buffer[:count])
        done += count
        on_bytes(count)
    return done


def sha256_of_range(
    descriptor: int, first: int, length: int, on_bytes: OnBytes = lambda count: None
) -> str:
    """Return the SHA-256 of a range of an open file, as lower-case hex.

    Raises:
        OSError: if the file cannot be read.
    """
    digest = new_sha256()
    read_into(digest, descriptor, first, length, on_bytes)
    return digest.hexdigest()


def sha256_of(path: Path, on_bytes: OnBytes = lambda count: None) -> str:
    """Return the SHA-256 of a file, as lower-case hex.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    descriptor = open_regular(path, follow_links=True)
    try:
        return sha256_of_range(descriptor, 0, os.fstat(descriptor).st_size, on_bytes)
    finally:
        os.close(descriptor)
