"""Find and remove what nothing needs: old revisions, remains of transfers, contents of none.

A revision is not needed if no branch or tag points to it, unless it was downloaded by its commit,
or an alias of k2 names the commit. Nothing of a repository that is being written is touched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.models.catalog import HubSource, catalog
from k2cli.models.files import is_being_made, remove_made_folder
from k2cli.models.inventory.folders import conversion_lock
from k2cli.models.inventory.hub_cache import (
    CachedRepository,
    Leftover,
    is_content_name,
    leftover,
    owner_counts,
    read_hub_cache,
)
from k2cli.models.inventory.known_folders import known_folders
from k2cli.models.inventory.remove import (
    remove_leftover,
    remove_revisions,
    remove_unused_content,
)
from k2cli.models.inventory.stored import RevisionParts, revision_parts
from k2cli.models.inventory.writers import is_held, writer_of_folder, writer_of_repository
from k2cli.models.sources.cache_layout import cache_folder
from k2cli.settings import data_directory, models_directory

_SECONDS_PER_HOUR = 3600.0
_MADE_FOLDER = re.compile(r"\.(.+)\.k2-[a-z0-9_]{8}")

What = Literal["revision", "download", "push", "content", "folder"]


class PruneItem(msgspec.Struct, frozen=True):
    """One thing that nothing needs, with the bytes that removing it frees.

    ``path`` is a revision's folder, a file or a folder; ``name`` is the model or the folder that it
    belongs to, and ``why`` is the reason in words.
    """

    what: What
    name: str
    path: str
    bytes: int
    why: str


class PruneResult(msgspec.Struct, frozen=True):
    """Things that can be removed, and those that look alike but are kept, with the reason."""

    items: tuple[PruneItem, ...]
    kept: tuple[str, ...] = ()


def find_prunable(hours: float, in_use: frozenset[str] = frozenset()) -> PruneResult:
    """Find what nothing needs; remove nothing.

    Args:
        hours: the age below which unfinished files are kept, since a transfer may go on with them.
        in_use: the folders of models that runs use.

    Raises:
        OSError: if the Hub's cache cannot be listed.
    """
    before = time.time() - hours * _SECONDS_PER_HOUR
    items: list[PruneItem] = []
    kept: list[str] = []
    repositories = read_hub_cache(cache_folder())
    for repository in repositories:
        if repository.problem:
            kept.append(repository.problem)
        elif writer := writer_of_repository(repository):
            kept.append(f"{repository.repo}: a {writer} is running")
        else:
            items += _of_repository(repository, repositories, before, in_use, kept)
    items += _of_folders(before)
    items += _of_conversions(before)
    return PruneResult(tuple(items), tuple(kept))


def _of_repository(
    repository: CachedRepository,
    repositories: Sequence[CachedRepository],
    before: float,
    in_use: frozenset[str],
    kept: list[str],
) -> Iterator[PruneItem]:
    gone: set[Path] = set()
    parts = revision_parts(repository)
    owners = owner_counts(repositories)
    for part in parts:
        if part.revision.references:
            continue
        reason = _reason_to_keep(repository, part, before, in_use)
        if not reason and repository.unclear:
            reason = f"'{repository.unclear[0]}' names no commit, and may have been this one"
        if reason:
            kept.append(f"{repository.repo}@{part.revision.commit[:8]}: {reason}")
            continue
        sizes = {file.identity: file.nbytes for file in part.revision.files if file.identity}
        owners.subtract(sizes.keys())
        freed = sum(size for key, size in sizes.items() if owners[key] == 0)
        freed += sum(each.nbytes for each in part.leftovers)
        gone |= {each.path for each in part.leftovers}
        yield PruneItem(
            "revision",
            f"{repository.repo}@{part.revision.commit[:8]}",
            str(part.revision.folder),
            freed,
            "no branch or tag points to it",
        )
    inside = [each for part in parts for each in part.revision.leftovers]
    for each in dict.fromkeys((*repository.leftovers, *inside)):
        if each.path not in gone and each.changed <= before:
            yield _leftover_item(each, repository.repo)
    linked = {file.blob for part in parts for file in part.revision.files}
    shared = owner_counts(repositories)
    for blob in repository.blobs:
        if blob.path not in linked and is_content_name(blob.name):
            freed = 0 if shared[blob.identity or (0, 0)] else blob.nbytes
            yield PruneItem(
                "content", repository.repo, str(blob.path), freed, "no revision has this file"
            )


def _reason_to_keep(
    repository: CachedRepository, part: RevisionParts, before: float, in_use: frozenset[str]
) -> str:
    """Return why a revision without branch is kept; "" if it is not."""
    commit, record = part.revision.commit, part.record
    if str(part.revision.folder) in in_use or str(part.revision.folder.resolve()) in in_use:
        return "a run uses it"
    if record is not None and record.written_by == "k2":
        if record.revision == commit or record.revision.startswith(commit):
            return "it was downloaded by its commit"
        if part.contents.state in ("incomplete", "config"):
            times = [file.changed for file in part.revision.files]
            times += [each.changed for each in part.leftovers]
            if max(times, default=part.revision.folder.stat().st_mtime) > before:
                return "its download was interrupted not long ago"
    for entry in catalog().values():
        source = entry.source
        if isinstance(source, HubSource) and (source.repo, source.revision) == (
            repository.repo,
            commit,
        ):
            return f"it is {entry.alias}"
    return ""


def _leftover_item(each: Leftover, name: str) -> PruneItem:
    what: What = "push" if each.pushed else "download"
    return PruneItem(what, name, str(each.path), each.nbytes, f"of an interrupted {what}")


def _of_folders(before: float) -> Iterator[PruneItem]:
    """Find remains of transfers to folders that k2 knows, and of an interrupted quantization."""
    for known in known_folders():
        folder = Path(known.path)
        if folder.is_dir():
            yield from _of_folder(folder, before)
        if known.origin == "quantize":
            yield from _made_folders(folder.parent, before, folder.name)
    for path in _subfolders(models_directory()):
        yield from _of_folder(path, before)


def _of_folder(folder: Path, before: float) -> Iterator[PruneItem]:
    if writer_of_folder(folder):
        return
    downloads = folder / ".cache" / "huggingface" / "download"
    for base in (folder, downloads):
        for path in sorted(base.iterdir()) if base.is_dir() else ():
            left = leftover(path)
            # In the folder itself, only names of pushes are k2's; others may be the user's.
            own = left is not None and (left.pushed or base == downloads)
            if left is not None and own and left.changed <= before:
                yield _leftover_item(left, folder.name)


def _subfolders(base: Path) -> list[Path]:
    if not base.is_dir():
        return []
    return sorted(
        path
        for path in base.iterdir()
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    )


def _of_conversions(before: float) -> Iterator[PruneItem]:
    """Find what conversions and downloads of wheels left when they were killed."""
    if is_held(conversion_lock()):
        return
    yield from _made_folders(models_directory(), before)
    downloads = data_directory() / "downloads"
    for path in sorted(downloads.glob(".fetch-*")):
        yield from _folder_item(path, path.name, before)


def _made_folders(base: Path, before: float, name: str = "") -> Iterator[PruneItem]:
    for path in sorted(base.glob(".*.k2-*")):
        match = _MADE_FOLDER.fullmatch(path.name)
        if match is not None and name in ("", match[1]):
            yield from _folder_item(path, match[1], before)


def _folder_item(path: Path, name: str, before: float) -> Iterator[PruneItem]:
    try:
        if path.is_symlink() or not path.is_dir() or is_being_made(path):
            return
        found = [each.lstat() for each in (path, *path.rglob("*"))]
    except OSError:
        return  # it is being renamed, or is of another user
    if max(max(each.st_mtime, each.st_ctime) for each in found) <= before:
        size = sum(min(each.st_size, each.st_blocks * 512) for each in found)
        yield PruneItem("folder", name, str(path), size, "of an interrupted conversion")


def prune(items: Sequence[PruneItem]) -> None:
    """Remove what ``find_prunable`` has found.

    Raises:
        K2Error: if something is being written by now.
        OSError: if something cannot be removed.
    """
    for item in items:
        path = Path(item.path)
        if item.what == "revision":
            remove_revisions(path.parent.parent, {path.name})
        elif item.what == "folder":
            remove_made_folder(path)
        elif item.what == "content":
            remove_unused_content(path)
        else:
            remove_leftover(path)
    for repository in read_hub_cache(cache_folder()):
        is_empty = not (repository.revisions or repository.blobs or repository.leftovers)
        named = repository.references or repository.unclear
        if is_empty and not repository.problem and not named:
            remove_revisions(repository.folder, ())
