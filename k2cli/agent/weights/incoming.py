"""Files that are being received: partial files with a journal, and their way into place.

Each segment of ``SEGMENT_BYTES`` is written to the partial file, and then its SHA-256 to the
journal. After a break, the segments that the journal names are hashed again, and those that are as
it says are not sent again. A complete file is flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from k2cli.agent.weights.messages import (
    ANOTHER_SIZE,
    SEGMENT_BYTES,
    WeightsFile,
    segment_count,
    segment_length,
)
from k2cli.agent.weights.place import Place
from k2cli.files import APPEND, name_with, open_regular, read_regular, write_at
from k2cli.models.digests import OnBytes, sha256_of, sha256_of_range
from k2cli.models.inventory.verified import FileState, read_states, state_of
from k2cli.models.sources.expected_files import expected_file, has_content

_JOURNAL_LIMIT_BYTES = 256 * 2**20
_LINE = re.compile(rb"(\d{1,9}) ([0-9a-f]{64})")


@dataclass(slots=True)
class IncomingFile:
    """One file of an offer, and the segments of it that are not here yet."""

    offer: WeightsFile
    data: Path
    link: Path | None = None
    missing: set[int] = field(default_factory=set)
    digest: str = ""
    own_name: str = ""
    known: FileState | None = None
    checked_whole: bool = False
    received: bool = False
    _descriptor: int | None = None
    _journal: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def partial(self) -> Path:
        """The file while it is incomplete."""
        return self._beside("k2-incoming")

    @property
    def journal(self) -> Path:
        """The file of the segments that the partial file has."""
        return self._beside("k2-journal")

    def _beside(self, ending: str) -> Path:
        return self.data.with_name(name_with(f".{self.own_name or self.data.name}", f".{ending}"))

    @property
    def missing_bytes(self) -> int:
        """Bytes that are yet to be received."""
        return sum(segment_length(self.offer.nbytes, number) for number in self.missing)

    def examine(self, on_bytes: OnBytes) -> None:
        """Find what is missing, and hash what an interrupted transfer has left.

        Raises:
            OSError: if the files cannot be read.
        """
        size = _size_of(self.data)
        if size not in (-1, self.offer.nbytes) and not self.offer.blob:
            self.digest = ANOTHER_SIZE  # a partial file has another name, so this is not one
            return
        if size == self.offer.nbytes:
            if self.offer.blob:
                if self._is_right(on_bytes):
                    return
            else:
                if _modified(self.data) != self.offer.modified_ns:
                    self.digest = sha256_of(self.data, on_bytes)
                return
        self.miss_everything()
        if _size_of(self.partial) == self.offer.nbytes and self.offer.nbytes:
            self.missing -= set(self._intact(on_bytes))

    def _is_right(self, on_bytes: OnBytes) -> bool:
        """True if data of the right size have the hash that is their name.

        They are not read if they are as they were when they were found to be right; or received
        from the very file that is offered now.
        """
        known = self.known
        if known is not None and known.content_hash == self.offer.blob and known.is_of(self.data):
            of_source = known.modified_ns == self.offer.modified_ns
            if known.checked == "whole" or of_source:
                return True
        file = expected_file(self.offer.name, self.offer.nbytes, self.offer.blob)
        self.checked_whole = file is not None and has_content(self.data, file, on_bytes)
        return self.checked_whole

    def state(self) -> FileState | None:
        """Return the state of a complete file that was hashed, to be noted.

        A file that is offered without a hash was hashed if it was received, piece by piece.
        """
        if self.missing:
            return None
        if self.checked_whole:
            return state_of(self.data, self.offer.blob, "push")
        known = self.known
        if known is not None and known.content_hash == self.offer.blob and known.is_of(self.data):
            return known
        if not (self.offer.blob or self.received):
            return None
        return state_of(self.data, self.offer.blob, "push", "pieces")

    def miss_everything(self) -> None:
        """Mark all segments as missing."""
        self.missing = set(range(segment_count(self.offer.nbytes)))
        self.digest = ""

    @property
    def is_there(self) -> bool:
        """True if a file of the right size is in its place."""
        return _size_of(self.data) == self.offer.nbytes

    def _intact(self, on_bytes: OnBytes) -> Iterator[int]:
        """Yield the segments of the partial file whose digest is the one in the journal."""
        try:
            text = read_regular(self.journal, _JOURNAL_LIMIT_BYTES)
        except OSError:
            return
        known = {int(match[1]): match[2].decode() for match in _LINE.finditer(text)}
        with os.fdopen(open_regular(self.partial), "rb", buffering=0) as file:
            for number in sorted(known.keys() & self.missing):
                length = segment_length(self.offer.nbytes, number)
                digest = sha256_of_range(file.fileno(), number * SEGMENT_BYTES, length, on_bytes)
                if digest == known[number]:
                    yield number

    def open(self) -> None:
        """Open the partial file and its journal for writing; called before segments arrive.

        Raises:
            OSError: if they cannot be written.
        """
        with self._lock:
            if self._descriptor is not None:
                return
            self.data.parent.mkdir(parents=True, exist_ok=True)
            whole = len(self.missing) == segment_count(self.offer.nbytes)
            fresh = os.O_TRUNC if whole else 0
            self._journal = open_regular(self.journal, APPEND | fresh, mode=0o644)
            descriptor = open_regular(self.partial, os.O_RDWR | os.O_CREAT | fresh, mode=0o644)
            os.ftruncate(descriptor, self.offer.nbytes)
            self._descriptor = descriptor

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes of a segment.

        Raises:
            OSError: if the disk is full, for example; it names the file.
        """
        assert self._descriptor is not None
        try:
            write_at(self._descriptor, data, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.data)) from error

    def confirm(self, number: int, digest: str) -> bool:
        """Record a segment whose digest is right; return True if the file now is complete.

        Raises:
            OSError: if the journal cannot be written.
        """
        assert self._journal is not None
        line = f"{number} {digest}\n".encode()
        if os.write(self._journal, line) < len(line):
            raise OSError(28, os.strerror(28), str(self.data))
        with self._lock:
            self.missing.discard(number)
            return not self.missing

    def complete(self) -> None:
        """Flush the file to the disk and put it in its place.

        Raises:
            OSError: if that fails, or what was received has vanished.
        """
        if self._descriptor is None and self.offer.nbytes not in (0, _size_of(self.partial)):
            # Opening would make a file of zeros.
            raise OSError(errno.ENOENT, "it has vanished during the transfer", str(self.data))
        self.open()
        with self._lock:
            assert self._descriptor is not None
            os.fsync(self._descriptor)
            self.close()
            os.utime(self.partial, ns=(self.offer.modified_ns, self.offer.modified_ns))
            os.replace(self.partial, self.data)
            self.journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        for descriptor in (self._descriptor, self._journal):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._journal = None

    def adopt(self) -> None:
        """Give the file the time of change of the source's, which has the same content."""
        os.utime(self.data, ns=(self.offer.modified_ns, self.offer.modified_ns))

    def make_link(self) -> None:
        """Make the snapshot's link to the data of the Hub's cache.

        Raises:
            OSError: if it cannot be made.
        """
        if self.link is None or (self.link.exists() and self.link.samefile(self.data)):
            return
        self.link.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.link.with_name(name_with(f".{self.link.name}", ".k2-link"))
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(os.path.relpath(self.data, self.link.parent))
        except OSError:  # a disk without links, such as exFAT: the file itself is there
            os.replace(self.data, self.link)
            self.data, self.link = self.link, None
            return
        os.replace(temporary, self.link)


def incoming_file(place: Place, offer: WeightsFile) -> IncomingFile:
    """Return the paths of an offered file on this machine."""
    path = place.folder / offer.name
    if place.blobs is None or not offer.blob or (path.is_file() and not path.is_symlink()):
        return IncomingFile(offer, path)
    return IncomingFile(offer, place.blobs / offer.blob, path)


def incoming_files(place: Place, offers: Sequence[WeightsFile]) -> list[IncomingFile]:
    """Return the paths of all offered files.

    Files of the same content share a blob of the Hub's cache. Each is received into a partial file
    of its own: the second would otherwise empty what was received and verified of the first.
    """
    files = [incoming_file(place, offer) for offer in offers]
    states = read_states(place.folder, [file.offer.name for file in files])
    for file in files:
        file.known = states.get(file.offer.name)
    seen: dict[Path, int] = {}
    for file in files:
        count = seen[file.data] = seen.get(file.data, 0) + 1
        if count > 1:
            file.own_name = f"{file.data.name}.{count}"
    return files


def examine_all(files: list[IncomingFile], on_bytes: OnBytes) -> None:
    """Examine files, several at once."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda file: file.examine(on_bytes), files):
            pass


def _size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.stat().st_size
    return -1


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns
