"""Targets of downloads: the cache of the Hub library, or a folder of the user's choice.

Both are laid out as huggingface_hub does, so that each tool takes what the other has fetched: in
the cache ``blobs/HASH`` with links from ``snapshots/COMMIT/``, and in a folder the files themselves
with notes in ``.cache/huggingface/``. Partial files of k2 have names that the library does not use.
Its lock files are used, so that two downloads of one file do not run at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import name_with, read_regular, write_atomically
from k2cli.models.sources.expected_files import ExpectedFile, header_damage, verify_file
from k2cli.models.sources.journal import journaled_bytes

_TRY_SECONDS = 0.01
_CLOCK_SECONDS = 2.0
"""Precision of the times of files on exFAT."""

# The Hub library otherwise asks the server for a list of coding agents, tells it which one runs it,
# and keeps the list in HF_HOME, where an answer of another form makes every later request fail.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def cache_folder() -> Path:
    """Return the folder in which the Hub library keeps downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(repo: str) -> Path:
    """Return a repository's folder in the cache of the Hub library."""
    return cache_folder() / "--".join(("models", *repo.split("/")))


def shared_store_file(blob: Path, cache: Path) -> Path | None:
    """Return the file of the store that repositories share, if a content is a link to it.

    The Hub library has it since version 2, without a public name.
    """
    try:
        from huggingface_hub.utils import _shared_blobs
    except ImportError:
        return None
    if not blob.is_symlink() or not _shared_blobs.is_shared_blobs_dir(cache / "blobs"):
        return None
    return _shared_blobs.shared_blob_target(blob, cache)


def sweep_shared_store(file: Path, cache: Path) -> None:
    """Remove a file of that store if no repository has it any more."""
    from huggingface_hub.utils import _shared_blobs

    _shared_blobs.sweep_shared_blob(file, cache_dir=cache)


def try_lock(path: Path) -> contextlib.ExitStack | None:
    """Take a lock file in the way of the Hub library; None if another process holds it."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # lazily exported

    path.parent.mkdir(parents=True, exist_ok=True)
    stack = contextlib.ExitStack()
    try:
        stack.enter_context(WeakFileLock(path, timeout=_TRY_SECONDS))
    except TimeoutError:
        return None
    return stack


def _links_work(folder: Path) -> bool:
    """True if the volume of a folder has symbolic links; exFAT has none."""
    from huggingface_hub.file_download import are_symlinks_supported

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's advice is for Windows
        return bool(are_symlinks_supported(folder))


def is_whole(path: Path, file: ExpectedFile) -> bool:
    """True if a file on this machine has the right size and a header that fits it.

    Its bytes are not read: a terabyte would take minutes. A header that looks damaged is one at its
    source if the hash is right.
    """
    try:
        if not path.is_file() or path.stat().st_size != file.nbytes:
            return False
        return header_damage(path, file) is None or verify_file(path, file) is None
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Place of a file in the cache of the Hub library; see ``parallel_download.Place``."""

    file: ExpectedFile
    storage: Path
    snapshot: Path
    links: bool

    @property
    def blob(self) -> Path:
        """Path of the content, which is named by its hash."""
        return self.storage / "blobs" / self.file.blob_name

    @property
    def path(self) -> Path:
        """Path of the file in the model's folder."""
        return self.snapshot / self.file.name

    @property
    def partial(self) -> Path:
        """Path of its partial content."""
        return self.blob.with_name(f"{self.blob.name}.partial")

    @property
    def journal(self) -> Path:
        """Path of its journal."""
        return self.blob.with_name(f"{self.blob.name}.journal")

    @property
    def lock(self) -> Path:
        """Path of the lock that the Hub library uses for this content."""
        locks = self.storage.parent / ".locks" / self.storage.name
        return locks / f"{self.blob.name}.lock"

    def prepare(self) -> None:
        """Make the folders that it needs."""
        self.blob.parent.mkdir(parents=True, exist_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def try_lock(self) -> contextlib.ExitStack | None:
        """Take the lock that the Hub library uses for this content."""
        return try_lock(self.lock)

    def is_there(self) -> bool:
        """True if nothing needs to be fetched; writes nothing."""
        return is_whole(self.path, self.file) or is_whole(self.blob, self.file)

    def find(self) -> Path | None:
        """Return the file's path if its content is there; remove what is damaged."""
        if is_whole(self.path, self.file):
            return self.path
        if is_whole(self.blob, self.file):
            return self.link()
        self.discard()
        return None

    def link(self) -> Path:
        """Show the content, which is there, in the model's folder, and return the file's path."""
        self.prepare()
        self._show_blob(is_new=False)
        return self.path

    def discard(self) -> None:
        """Remove the file with its content, which is damaged."""
        for damaged in (self.path, self.blob):
            damaged.unlink(missing_ok=True)

    def put(self) -> Path:
        """Rename the partial content to the blob, and link it from the snapshot."""
        os.replace(self.partial, self.blob)
        self.journal.unlink(missing_ok=True)
        self._show_blob(is_new=True)
        return self.path

    def _show_blob(self, *, is_new: bool) -> None:
        """Put the content in the snapshot; what is there stays until then."""
        if not self.links and is_new:
            os.replace(self.blob, self.path)
            return
        target = os.path.relpath(self.blob, self.path.parent)
        if self.links and self.path.is_symlink() and os.readlink(self.path) == target:
            return
        ending = f".{os.urandom(4).hex()}"
        temporary = self.path.with_name(name_with(f".{self.path.name}", ending))
        try:
            if self.links:
                temporary.symlink_to(target)
            else:
                # Another snapshot may have the blob as its file; so does the Hub library.
                import shutil

                shutil.copyfile(self.blob, temporary)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class FolderPlace:
    """Place of a file in a folder of the user's choice; see ``parallel_download.Place``."""

    file: ExpectedFile
    folder: Path
    commit: str

    @property
    def path(self) -> Path:
        """Path of the file in the model's folder."""
        return self.folder / self.file.name

    @property
    def partial(self) -> Path:
        """Path of its partial content."""
        return self._own(".partial")

    @property
    def journal(self) -> Path:
        """Path of its journal."""
        return self._own(".journal")

    @property
    def lock(self) -> Path:
        """Path of the lock that the Hub library uses for this file."""
        return self._notes().with_suffix(".lock")

    def _own(self, ending: str) -> Path:
        place = hashlib.sha256(self.file.name.encode()).hexdigest()[:16]
        return self._notes().parent / f"{place}.{self.file.blob_name[:40]}{ending}"

    def _notes(self) -> Path:
        path = self.folder / ".cache" / "huggingface" / "download" / self.file.name
        return path.with_name(name_with(path.name, ".metadata"))

    def prepare(self) -> None:
        """Make the folders that it needs.

        Raises:
            K2Error: if a link leads out of the folder.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._notes().parent.mkdir(parents=True, exist_ok=True)
        inside = self.folder.resolve()
        for parent in (self.path.parent, self._notes().parent):
            if not parent.resolve().is_relative_to(inside):
                raise K2Error(f"'{parent}' is a link out of '{self.folder}'", f"rm '{parent}'")

    def try_lock(self) -> contextlib.ExitStack | None:
        """Take the lock that the Hub library uses for this file."""
        return try_lock(self.lock)

    def is_there(self) -> bool:
        """True if nothing needs to be fetched; writes nothing."""
        if not is_whole(self.path, self.file):
            return False
        noted = self.noted_hash()
        if noted is None or self.is_changed():  # a file that no tool fetched, or not as it is now
            return verify_file(self.path, self.file) is None
        return noted == self.file.blob_name

    def find(self) -> Path | None:
        """Return the file's path if it is there; what is there instead stays until ``put``."""
        if not self.is_there():
            return None
        self._note()
        return self.path

    def discard(self) -> None:
        """Remove the file, which is damaged."""
        for damaged in (self.path, self._notes()):
            damaged.unlink(missing_ok=True)

    def put(self) -> Path:
        """Rename the partial content to the file, and note its hash as the Hub library does."""
        self._notes().unlink(missing_ok=True)
        os.replace(self.partial, self.path)
        self.journal.unlink(missing_ok=True)
        self._note()
        return self.path

    def _note(self) -> None:
        text = f"{self.commit}\n{self.file.blob_name}\n{time.time()}\n"
        write_atomically(self._notes(), text)

    def noted_hash(self) -> str | None:
        """Return the hash of the file that was fetched; None if that is not noted."""
        lines = self._note_lines()
        return lines[1].strip() if len(lines) > 1 else None

    def is_changed(self) -> bool:
        """True if the file has changed since its hash was noted, as the Hub library sees it."""
        try:
            noted_seconds = float(self._note_lines()[2])
            return self.path.stat().st_mtime > noted_seconds + _CLOCK_SECONDS
        except (OSError, ValueError, IndexError):
            return True

    def _note_lines(self) -> list[str]:
        try:
            return read_regular(self._notes(), 10_000).decode().splitlines()
        except (OSError, UnicodeDecodeError):
            return []


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Places of a revision in the cache of the Hub library.

    ``storage`` is the repository's folder, if it is not in the cache that the environment names.
    """

    repo: str
    commit: str
    storage: Path | None = None

    @property
    def repository(self) -> Path:
        """Folder of the repository."""
        return self.storage or repository_folder(self.repo)

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.repository / "snapshots" / self.commit

    def places(self, files: list[ExpectedFile], *, write: bool) -> list[CachePlace]:
        """Return the places of files; with ``write`` their folders are made.

        Raises:
            OSError: if a folder cannot be made.
        """
        storage, links = self.repository, True
        if write:
            storage.mkdir(parents=True, exist_ok=True)
            links = _links_work(storage.parent)
            _tag_cache(storage.parent)
        places = [CachePlace(file, storage, self.folder, links) for file in files]
        if write:
            for place in places:
                place.prepare()
        return places

    def set_revision(self, revision: str) -> None:
        """Note that a branch or tag is this commit, as the Hub library does.

        Raises:
            OSError: if it cannot be written.
        """
        if revision == self.commit:
            return
        path = self.repository / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.commit)


@dataclass(frozen=True, slots=True)
class FolderLayout:
    """Places of a revision in a folder of the user's choice."""

    folder: Path
    commit: str

    def places(self, files: list[ExpectedFile], *, write: bool) -> list[FolderPlace]:
        """Return the places of files; with ``write`` their folders are made.

        Raises:
            OSError: if a folder cannot be made.
            K2Error: if a link leads out of the folder.
        """
        places = [FolderPlace(file, self.folder, self.commit) for file in files]
        if write:
            for place in places:
                place.prepare()
        return places

    def set_revision(self, revision: str) -> None:
        """Do nothing: a folder has one revision, which its record names."""


Layout = CacheLayout | FolderLayout


def missing_bytes(place: CachePlace | FolderPlace) -> int:
    """Return how many bytes of a file are still to be fetched, as far as its journal says."""
    return place.file.nbytes - min(place.file.nbytes, journaled_bytes(place.journal, place.file))


def _tag_cache(folder: Path) -> None:
    """Mark the cache for backup programs, as the Hub library does."""
    path = folder / "CACHEDIR.TAG"
    with contextlib.suppress(OSError):
        if not path.exists():
            path.write_text(
                "Signature: 8a477f597d28d172789f06886806bc55\n"
                "# This folder is a cache: https://bford.info/cachedir/\n"
            )
