"""Files that a revision of a model has, by name, size and hash, and the check of a file by them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.digests import OnBytes, new_digest, read_into
from k2cli.models.safetensors_header import read_safetensors_header

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ExpectedFile:
    """One file of a revision, by its path in the repository, with one hash of its content.

    ``sha256`` is set for files in Git LFS. The others have ``git_sha1``, the name that git gives to
    their content.
    """

    name: str
    nbytes: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def blob_name(self) -> str:
        """Name of its content in the cache of the Hub library: the hash."""
        return self.sha256 or self.git_sha1 or ""


def expected_file(name: str, nbytes: int, content_hash: str) -> ExpectedFile | None:
    """Make an ``ExpectedFile`` from a hash of either kind; None if it is neither."""
    if _SHA256.fullmatch(content_hash):
        return ExpectedFile(name, nbytes, sha256=content_hash)
    if _SHA1.fullmatch(content_hash):
        return ExpectedFile(name, nbytes, git_sha1=content_hash)
    return None


def verify_file(
    path: Path, expected: ExpectedFile, on_bytes: OnBytes = lambda count: None
) -> str | None:
    """Check a file on this machine by its size, its safetensors header and its hash.

    Args:
        on_bytes: called with the number of bytes of each piece that was read.

    Returns:
        The damage, as a phrase for a message, or None if the file is the expected one.

    Raises:
        OSError: if it is there but cannot be read.
    """
    try:
        descriptor = open_regular(path, follow_links=True)
    except FileNotFoundError:
        return "is missing"
    try:
        size = os.fstat(descriptor).st_size
        if size != expected.nbytes:
            return f"has {size} bytes, not {expected.nbytes}"
        if (damage := header_damage(path, expected)) is not None:
            return damage
        digest = new_digest(expected.blob_name, size)
        read_into(digest, descriptor, 0, size, on_bytes)
    finally:
        os.close(descriptor)
    found = digest.hexdigest()
    return None if found == expected.blob_name else f"has another hash than {expected.blob_name}"


def has_content(path: Path, expected: ExpectedFile, on_bytes: OnBytes) -> bool:
    """True if a file has the expected content, whatever its header says; False if it is not there.

    Raises:
        OSError: if it is there but cannot be read.
    """
    try:
        descriptor = open_regular(path, follow_links=True)
    except FileNotFoundError:
        return False
    try:
        size = os.fstat(descriptor).st_size
        digest = new_digest(expected.blob_name, size)
        if size == expected.nbytes:
            read_into(digest, descriptor, 0, size, on_bytes)
    finally:
        os.close(descriptor)
    return digest.hexdigest() == expected.blob_name


def header_damage(path: Path, expected: ExpectedFile) -> str | None:
    """Return what is wrong with the header of a safetensors file; None for other files.

    ``path`` may be that of its content in the cache, which is named by its hash.
    """
    if not expected.name.endswith(".safetensors"):
        return None
    try:
        read_safetensors_header(path)
    except K2Error as error:
        return f"has a damaged header ({error.message})"
    return None
