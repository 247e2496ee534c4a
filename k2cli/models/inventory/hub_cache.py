"""Contents of the Hub library's cache: revisions, the files that they share, and leftovers.

The library's own ``scan_cache_dir`` skips a whole repository if one entry of it is odd, and knows
nothing of k2's partial files, so that it cannot tell what an interrupted download has left. Nothing
is followed out of the cache except the links to contents, whose sizes are read.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2cli.files import matching, read_regular

_PREFIX = "models--"
_MAX_REFERENCE_BYTES = 200
_HASH = re.compile(r"\.?([0-9a-f]{64}|[0-9a-f]{40})\b")
_DOWNLOADED = re.compile(r".+\.(?:partial|journal|incomplete)|\..+\.[0-9a-f]{8}\.shared")
_PUSHED = re.compile(r"\..+\.(?:k2-incoming|k2-journal|k2-link)")
INCOMING_LOCK = ".k2-incoming.lock"
"""Lock of a receiver of weights, in the repository's folder of the cache or the model's own."""
_IGNORED = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_OWN_FOLDERS = ("snapshots", "blobs", "refs", "trees", ".no_exist", ".k2")
_COMMIT = re.compile(r"[0-9A-Za-z][\w.-]{0,199}", re.ASCII)
_CONTENT = re.compile(r"[0-9a-fA-F]{32,64}(?:-\d{1,6})?")

Identity = tuple[int, int]
"""Device and number of a file: two names of the same data have the same."""


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file of a revision.

    ``blob`` is the entry of ``blobs`` that it links to, None for a file without link (as on exFAT)
    and for a link elsewhere. ``identity`` is None if its data are missing.
    """

    name: str
    path: Path
    blob: Path | None
    nbytes: int
    identity: Identity | None
    changed: float

    @property
    def is_link_elsewhere(self) -> bool:
        """True for a link that does not lead to this repository's contents."""
        return self.blob is None and self.path.is_symlink()


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file of an unfinished download or push. ``nbytes`` are those that it takes on the disk.

    ``blob_name`` is the hash of the whole content, "" if the name does not tell it.
    """

    path: Path
    nbytes: int
    changed: float
    pushed: bool
    blob_name: str


@dataclass(frozen=True, slots=True)
class CachedRevision:
    """One revision of a repository; ``references`` are the branches and tags that point to it."""

    commit: str
    folder: Path
    references: tuple[str, ...]
    files: tuple[CachedFile, ...]
    leftovers: tuple[Leftover, ...]


@dataclass(frozen=True, slots=True)
class CachedRepository:
    """A repository in the cache.

    ``blobs`` are complete contents by name, with the bytes that they take. ``unclear`` are branches
    and tags that name no commit, as after a crash. ``problem`` says why nothing may be removed from
    the repository; empty if it may. What it has is then not known.
    """

    repo: str
    folder: Path
    revisions: tuple[CachedRevision, ...] = ()
    references: tuple[tuple[str, str], ...] = ()
    blobs: tuple[CachedFile, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    unclear: tuple[str, ...] = ()
    problem: str = ""

    @property
    def lock_folder(self) -> Path:
        """Folder of the Hub library's locks for this repository."""
        return self.folder.parent / ".locks" / self.folder.name


def read_hub_cache(cache: Path) -> list[CachedRepository]:
    """Read all models of a cache, in the order of their names.

    Raises:
        OSError: if the cache cannot be listed.
    """
    folders = [path for path in matching(cache, f"{_PREFIX}*") if path.is_dir()]
    found = [read_repository(folder) for folder in folders]
    # One that could not be read since another command was removing it is no problem.
    return [each for each in found if not each.problem or each.folder.exists()]


def owner_counts(repositories: Iterable[CachedRepository]) -> Counter[Identity]:
    """Count the revisions that have each file of the cache.

    Repositories share files too: the Hub library keeps those of equal content in one place.
    """
    counts = Counter[Identity]()
    for repository in repositories:
        for revision in repository.revisions:
            counts.update({file.identity for file in revision.files if file.identity is not None})
    return counts


def read_repository(folder: Path) -> CachedRepository:
    """Read a repository's folder; what cannot be read there is its ``problem``."""
    repo = folder.name.removeprefix(_PREFIX).replace("--", "/")
    try:
        for each in (folder, *(folder / name for name in _OWN_FOLDERS)):
            if each.is_symlink():
                problem = f"{each} is a link to {os.readlink(each)}"
                return CachedRepository(repo, folder, problem=problem)
        if (link := _link_elsewhere(folder / "snapshots")) is not None:
            problem = f"{link} is a link to {os.readlink(link)}"
            return CachedRepository(repo, folder, problem=problem)
        every = sorted(_references(folder / "refs"))
        references = tuple((name, commit) for name, commit in every if commit)
        unclear = tuple(name for name, commit in every if not commit)
        blobs, leftovers = _blobs(folder / "blobs")
        names = _subfolders(folder / "snapshots")
        revisions = [_revision(folder / "snapshots" / name, references) for name in names]
    except OSError as error:
        problem = f"{error.filename} cannot be read: {error.strerror}"
        return CachedRepository(repo, folder, problem=problem)
    revisions.sort(key=_order)
    return CachedRepository(repo, folder, tuple(revisions), references, blobs, leftovers, unclear)


def _order(revision: CachedRevision) -> tuple[bool, bool, float, str]:
    """Put the main branch first, then other branches and tags, then the newest."""
    newest = max((file.changed for file in revision.files), default=0.0)
    return "main" not in revision.references, not revision.references, -newest, revision.commit


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _link_elsewhere(snapshots: Path) -> Path | None:
    """Return a link that shows a revision from another place, whose files are not known here."""
    for path in sorted(snapshots.iterdir()) if snapshots.is_dir() else ():
        if not path.is_symlink():
            continue
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(snapshots):
            return path
    return None


def _references(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the commit of each branch and tag; "" for one that names no commit."""
    for path in _walk(folder):
        if path.name in _IGNORED or path.name.startswith("._"):
            continue
        commit = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = read_regular(path, _MAX_REFERENCE_BYTES).decode().strip()
        name = path.relative_to(folder).as_posix()
        yield name, commit if _COMMIT.fullmatch(commit) else ""


def is_content_name(name: str) -> bool:
    """True for the name of a complete content: its hash, or what a mirror sends instead."""
    return _CONTENT.fullmatch(name) is not None


def _walk(folder: Path) -> Iterator[Path]:
    """Yield what is below a folder and no folder itself; links to folders are not followed.

    Raises:
        OSError: if a folder cannot be listed. Its files are not known, which is not the same as
            that there are none.
    """

    def refuse(error: OSError) -> None:
        raise error

    if not os.path.lexists(folder):
        return
    for parent, folders, names in os.walk(folder, onerror=refuse):
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted([*names, *linked]):
            yield Path(parent) / name


def _blobs(folder: Path) -> tuple[tuple[CachedFile, ...], tuple[Leftover, ...]]:
    blobs, leftovers = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (left := leftover(path)) is not None:
            leftovers.append(left)
        elif path.name not in _IGNORED and (path.is_symlink() or not path.is_dir()):
            size, identity, changed = _examine(path)
            blobs.append(CachedFile(path.name, path, path, size, identity, changed))
    return tuple(blobs), tuple(leftovers)


def leftover(path: Path) -> Leftover | None:
    """Describe a file of an unfinished download or push; None for any other file."""
    pushed = _PUSHED.fullmatch(path.name) is not None
    if not pushed and not _DOWNLOADED.fullmatch(path.name):
        return None
    try:
        found = path.lstat()
    except OSError:
        return None
    if stat.S_ISDIR(found.st_mode):
        return None
    match = _HASH.match(path.name)
    allocated = min(found.st_size, found.st_blocks * 512)  # partial files have holes
    changed = max(found.st_mtime, found.st_ctime)
    return Leftover(path, allocated, changed, pushed, match[1] if match else "")


def _revision(folder: Path, references: Sequence[tuple[str, str]]) -> CachedRevision:
    files, leftovers = [], []
    blobs = folder.parent.parent / "blobs"
    for path in _walk(folder):
        left = leftover(path) if path.name.startswith(".") else None
        if left is not None:
            leftovers.append(left)
        elif path.name not in _IGNORED:
            size, identity, changed = _examine(path)
            name = str(path)[len(str(folder)) + 1 :]
            files.append(CachedFile(name, path, _blob_of(path, blobs), size, identity, changed))
    names = tuple(name for name, commit in references if commit == folder.name)
    return CachedRevision(folder.name, folder, names, tuple(files), tuple(leftovers))


def _blob_of(path: Path, blobs: Path) -> Path | None:
    """Return the entry of ``blobs`` that a link leads to at first; None if it leads elsewhere.

    That entry may itself be a link, into the store that repositories share.
    """
    try:
        link = os.readlink(path)
    except OSError:  # no link
        return None
    # As both libraries write it; no folder between the revision and its file is a link.
    parent, name = os.path.split(os.path.normpath(os.path.join(os.path.dirname(path), link)))
    if parent == str(blobs):
        return blobs / name
    target = path.parent / link
    inside = os.path.realpath(target.parent) == os.path.realpath(blobs)
    return blobs / target.name if inside and target.name != ".." else None


def _examine(path: Path) -> tuple[int, Identity | None, float]:
    try:
        found = path.stat()
    except OSError:
        return 0, None, 0.0
    if not stat.S_ISREG(found.st_mode):
        return 0, None, 0.0
    return found.st_size, (found.st_dev, found.st_ino), found.st_ctime
