"""Removal of models, in an order that can be interrupted.

The data of a model go before its links, its branches and its record. So a removal that was
interrupted leaves a model that is incomplete, and that a second removal ends.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import unwritable
from k2cli.models.inventory.folders import conversion_lock, is_k2s, wheel_file
from k2cli.models.inventory.hub_cache import (
    INCOMING_LOCK,
    CachedRepository,
    CachedRevision,
    Identity,
    Leftover,
    leftover,
    owner_counts,
    read_repository,
)
from k2cli.models.inventory.known_folders import (
    forget_folder,
    may_remove,
    notes_of,
    own_files,
)
from k2cli.models.inventory.stored import revision_parts
from k2cli.models.inventory.stored_model import StoredModel
from k2cli.models.inventory.verified import note_path
from k2cli.models.inventory.writers import (
    held,
    refuse_writer,
    writer_of_folder,
    writer_of_repository,
)
from k2cli.models.part import FOLDER
from k2cli.models.reference import SOURCE_NAME
from k2cli.models.sources.cache_layout import shared_store_file, sweep_shared_store
from k2cli.models.sources.snapshot_record import record_path


def freed_bytes(models: Sequence[StoredModel], repositories: Sequence[CachedRepository]) -> int:
    """Return the bytes that removing all of these models together frees.

    Args:
        models: those to remove.
        repositories: everything that the Hub's cache has.
    """
    total = sum(model.bytes for model in models if model.kind != "hub")
    chosen = {(model.repo, model.commit) for model in models if model.kind == "hub"}
    counts, going = owner_counts(repositories), Counter[Identity]()
    sizes: dict[Identity, int] = {}
    for repository in repositories:
        commits = {commit for repo, commit in chosen if repo == repository.repo}
        parts = [part for part in revision_parts(repository) if part.revision.commit in commits]
        for part in parts:
            found = {file.identity: file.nbytes for file in part.revision.files if file.identity}
            going.update(found.keys())
            sizes |= found
            total += sum(each.nbytes for each in part.leftovers)
        if commits and len(parts) == len(repository.revisions):
            given = {each for part in parts for each in part.leftovers}
            total += sum(each.nbytes for each in repository.leftovers if each not in given)
            alone = {b.identity: b.nbytes for b in repository.blobs if b.identity}
            total += sum(size for key, size in alone.items() if key not in counts)
    return total + sum(size for key, size in sizes.items() if going[key] == counts[key])


def remove_models(models: Sequence[StoredModel]) -> None:
    """Remove models that nothing uses.

    Raises:
        K2Error: if one is being written, or cannot be removed.
    """
    revisions: dict[Path, list[StoredModel]] = {}
    for model in models:
        folder = Path(model.folder)
        try:
            if model.kind == "hub":
                revisions.setdefault(folder.parent.parent, []).append(model)
            elif model.kind == "converted":
                _remove_conversion(folder, model.name)
            else:
                _remove_folder(folder, model.name)
        except OSError as error:
            raise _failure(error, folder) from error
    for repository, chosen in revisions.items():
        try:
            remove_revisions(repository, {model.commit for model in chosen})
        except OSError as error:
            raise _failure(error, repository) from error


def _failure(error: OSError, folder: Path) -> K2Error:
    path = Path(os.fsdecode(error.filename)) if error.filename else folder
    return unwritable(error, path)


# --- the Hub's cache ----------------------------------------------------------------------------


def remove_revisions(folder: Path, commits: Collection[str]) -> None:
    """Remove revisions of a repository, and the contents that no other revision of it has.

    Raises:
        K2Error: if a download or a push is writing to the repository, or it is a link elsewhere.
        OSError: if something cannot be removed.
    """
    repository = read_repository(folder)
    _refuse_problem(repository)
    refuse_writer(writer_of_repository(repository), repository.repo)
    with ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(held(folder / INCOMING_LOCK, repository.repo))
        for part in revision_parts(repository):
            if part.revision.commit in commits:
                _remove_contents(repository, part.revision, commits)
                _remove_leftovers(repository, part.leftovers)
        for name, commit in repository.references:
            if commit in commits:
                _remove_reference(folder / "refs", name)
        for revision in repository.revisions:
            if revision.commit in commits:
                _remove_notes(folder, revision)
                shutil.rmtree(revision.folder)
        left = read_repository(folder)
        _refuse_problem(left)
        if not left.revisions:
            _remove_repository(left)
        (folder / INCOMING_LOCK).unlink(missing_ok=True)


def _refuse_problem(repository: CachedRepository) -> None:
    if repository.problem:
        raise K2Error(
            f"nothing of '{repository.repo}' is removed: {repository.problem}",
            "remove by hand what the link leads to, and then the link",
        )


def remove_unused_content(blob: Path) -> None:
    """Remove a content that no revision has, unless one has it by now.

    Raises:
        K2Error: if it is being downloaded, or the repository cannot be examined.
        OSError: if it cannot be removed.
    """
    storage = blob.parent.parent
    repository = read_repository(storage)
    _refuse_problem(repository)

    def is_used() -> bool:
        now = read_repository(storage)
        _refuse_problem(now)
        return any(file.blob == blob for revision in now.revisions for file in revision.files)

    remove_content(repository, blob, is_used)


def _remove_contents(
    repository: CachedRepository, revision: CachedRevision, commits: Collection[str]
) -> None:
    kept = {
        file.blob
        for other in repository.revisions
        for file in other.files
        if other.commit not in commits
    }
    before = _times(repository)

    def is_used(blob: Path) -> bool:
        """True if a download, which holds the same lock then, has linked it meanwhile."""
        if _times(repository) == before:
            return False
        now = read_repository(repository.folder)
        _refuse_problem(now)
        others = [each for each in now.revisions if each.commit not in commits]
        return any(file.blob == blob for other in others for file in other.files)

    largest = sorted(revision.files, key=lambda each: -each.nbytes)
    # Then the config, so that what is left is not taken for one that was fetched alone.
    rest = sorted(largest[1:], key=lambda each: each.name != "config.json")
    for file in (*largest[:1], *rest):
        if file.blob is not None and file.blob not in kept:
            remove_content(repository, file.blob, partial(is_used, file.blob))
        file.path.unlink(missing_ok=True)


def _times(repository: CachedRepository) -> dict[str, int]:
    """Return the last change of each folder with files of revisions, by its path."""
    found = {}
    with suppress(FileNotFoundError):
        for parent, _, _ in os.walk(repository.folder / "snapshots"):
            found[parent] = os.stat(parent).st_mtime_ns
    return found


def remove_content(
    repository: CachedRepository, blob: Path, is_used: Callable[[], bool] = lambda: False
) -> None:
    """Remove a content under the lock that a download of it holds.

    Args:
        is_used: called when the lock is held; the content stays if it returns True.

    Raises:
        K2Error: if it is being downloaded.
        OSError: if it cannot be removed.
    """
    with held(repository.lock_folder / f"{blob.name}.lock", repository.repo):
        if is_used():
            return
        shared = shared_store_file(blob, repository.folder.parent)
        blob.unlink(missing_ok=True)
    if shared is not None:
        sweep_shared_store(shared, repository.folder.parent)


def _remove_leftovers(repository: CachedRepository, leftovers: Sequence[Leftover]) -> None:
    for each in leftovers:
        name = each.blob_name or each.path.name
        with held(repository.lock_folder / f"{name}.lock", repository.repo):
            each.path.unlink(missing_ok=True)


def remove_leftover(path: Path) -> None:
    """Remove a file of an interrupted transfer, unless the transfer goes on.

    Raises:
        K2Error: if it does.
        OSError: if it cannot be removed.
    """
    left = leftover(path)
    inside = (each for each in path.parents if each.name in ("blobs", "snapshots"))
    storage = next((e.parent for e in inside if e.parent.name.startswith("models--")), None)
    if left is None:
        return
    if storage is not None:
        repository = read_repository(storage)
        _refuse_problem(repository)
        _remove_leftovers(repository, [left])
        return
    folder = path.parents[3] if path.parent.name == "download" else path.parent
    refuse_writer(writer_of_folder(folder), str(folder))
    path.unlink(missing_ok=True)


def _remove_reference(base: Path, name: str) -> None:
    path = base / name
    path.unlink(missing_ok=True)
    _remove_empty(path.parent, base)


def _remove_empty(folder: Path, base: Path) -> None:
    """Remove a folder and those that it is in, up to ``base``, as long as they are empty."""
    with suppress(OSError):
        while folder != base:
            folder.rmdir()
            folder = folder.parent


def _remove_notes(folder: Path, revision: CachedRevision) -> None:
    """Remove the record of a revision, the time of its verification, and the library's notes."""
    trees = folder / "trees" / f"{revision.commit}.json"
    for path in (trees, record_path(revision.folder)):
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()
    shutil.rmtree(folder / ".no_exist" / revision.commit, ignore_errors=True)


def _remove_repository(repository: CachedRepository) -> None:
    """Remove the folder of a repository that has no revision left."""
    for blob in repository.blobs:
        remove_content(repository, blob.path)
    _remove_leftovers(repository, repository.leftovers)
    shutil.rmtree(repository.folder)
    shutil.rmtree(repository.lock_folder, ignore_errors=True)


# --- other folders ------------------------------------------------------------------------------


def _remove_conversion(folder: Path, alias: str) -> None:
    """Remove a folder that k2 converted, its source file last, and the GGUF that k2 downloaded."""
    if folder.is_symlink():
        raise K2Error(
            f"nothing of '{alias}' is removed: {folder} is a link to {os.readlink(folder)}",
            "remove by hand what the link leads to, and then the link",
        )
    if not is_k2s(folder):
        raise _not_k2s(folder, alias)
    refuse_writer(writer_of_folder(folder), alias)
    with held(conversion_lock(), alias), held(folder / INCOMING_LOCK, alias):
        for path in _by_size(folder):
            path.unlink(missing_ok=True)
        # What says that k2 made the folder goes last, so that an interrupted removal can be ended.
        kept = {SOURCE_NAME, ".cache", INCOMING_LOCK}
        for path in folder.iterdir():
            if path.is_symlink() or not path.is_dir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)
            elif path.name not in kept:
                shutil.rmtree(path)
        shutil.rmtree(folder)
        if (gguf := wheel_file(folder.name)) is not None:
            gguf.unlink(missing_ok=True)


def _by_size(folder: Path) -> list[Path]:
    """Return the weights of a folder, the largest first."""
    weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
    return sorted(weights, key=lambda path: -path.lstat().st_size)


def _remove_folder(folder: Path, name: str) -> None:
    """Remove the files of a folder that k2 wrote, and the folder itself if nothing else is in it.

    Raises:
        K2Error: if k2 did not write it, or it is being written.
    """
    names = own_files(folder)
    if not may_remove(folder):
        raise _not_k2s(folder, name)
    refuse_writer(writer_of_folder(folder), name)
    with held(folder / INCOMING_LOCK, name):
        inside = folder.resolve()
        paths = [folder / each for each in names]
        paths = [path for path in paths if path.parent.resolve().is_relative_to(inside)]
        for path in sorted(paths, key=_size, reverse=True):
            path.unlink(missing_ok=True)
        for path in folder.iterdir():
            # Files of unfinished downloads are in the folder for notes, so others are the user's.
            if (left := leftover(path)) is not None and left.pushed:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (folder / INCOMING_LOCK).unlink(missing_ok=True)
    for parent in {path.parent for path in paths}:
        _remove_empty(parent, folder)
    if (folder / ".cache").resolve().is_relative_to(inside):
        _remove_folder_notes(folder)
    with suppress(OSError):
        folder.rmdir()
    forget_folder(folder)
    note_path(folder).unlink(missing_ok=True)


def _not_k2s(folder: Path, name: str) -> K2Error:
    return K2Error(
        f"k2 did not write '{name}', and removes only files that it wrote",
        f"see what is there: ls -la {shlex.quote(str(folder))}",
    )


def _remove_folder_notes(folder: Path) -> None:
    """Remove what download tools and k2 noted about a folder, and their folders if empty."""
    library = folder / ".cache" / "huggingface"
    for notes in notes_of(folder):
        if not notes.parent.is_symlink():
            shutil.rmtree(notes, ignore_errors=True)
    if not library.is_symlink():
        for name in ("CACHEDIR.TAG", ".gitignore"):
            (library / name).unlink(missing_ok=True)
        _remove_empty(library, folder)
    _remove_empty(folder / ".cache", folder)


def _size(path: Path) -> int:
    return path.lstat().st_size if os.path.lexists(path) else 0
