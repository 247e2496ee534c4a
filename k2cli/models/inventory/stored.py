"""List of the models on this machine: the Hub's cache, conversions of k2, and folders it knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from k2cli.models.catalog import HubSource, catalog
from k2cli.models.inventory.contents import Contents, contents_of, describe_config
from k2cli.models.inventory.folders import folder_models
from k2cli.models.inventory.hub_cache import (
    CachedRepository,
    CachedRevision,
    Identity,
    Leftover,
    owner_counts,
    read_hub_cache,
)
from k2cli.models.inventory.stored_model import StoredModel, StoredModels
from k2cli.models.inventory.verified import is_read, last_verified
from k2cli.models.inventory.writers import writer_of_repository
from k2cli.models.sources.cache_layout import cache_folder
from k2cli.models.sources.snapshot_record import SnapshotRecord, recorded_snapshot


def stored_models(used_folders: Collection[str] = ()) -> StoredModels:
    """List the models on this machine, sorted by name.

    Args:
        used_folders: folders of models that runs were launched with.

    Raises:
        OSError: if the Hub's cache cannot be listed.
    """
    base = cache_folder()
    models: list[StoredModel] = []
    problems: list[str] = []
    seen: set[Identity] = set()
    total = left = 0
    repositories = read_hub_cache(base)
    owners = owner_counts(repositories)
    for repository in repositories:
        if repository.problem:
            problems.append(repository.problem)
            continue
        parts = revision_parts(repository)
        found = list(_repository_models(repository, parts, owners, seen))
        models += found
        counted = sum(model.added_bytes for model in found)
        whole = counted + _unlisted_bytes(repository, parts)
        left += whole - counted
        total += whole
    others = folder_models(used_folders)
    models += others
    total += sum(model.added_bytes for model in others)
    # Revisions of one repository stay in their order, the main branch first.
    models.sort(key=lambda model: model.label.lower())
    return StoredModels(tuple(models), total, left, str(base), tuple(problems))


def _repository_models(
    repository: CachedRepository,
    parts: Sequence[RevisionParts],
    owners: Counter[Identity],
    seen: set[Identity],
) -> Iterator[StoredModel]:
    """Describe each revision of a repository.

    Args:
        owners: the number of revisions that have each file of the cache.
        seen: data that were counted before, to which those of this repository are added.
    """
    writer = writer_of_repository(repository)
    aliases = _aliases().get(repository.repo, ())
    for part in parts:
        revision, contents = part.revision, part.contents
        sizes = {file.identity: file.nbytes for file in revision.files if file.identity}
        partial = sum(each.nbytes for each in part.leftovers)
        about = describe_config(revision.folder)
        read = [file.name for file in revision.files if is_read(file.name)]
        is_whole = contents.state in ("complete", "part")
        yield StoredModel(
            name=_typed_name(repository, revision, aliases, part.record),
            kind="hub",
            folder=str(revision.folder),
            state=contents.state,
            bytes=sum(sizes.values()) + partial,
            added_bytes=sum(n for key, n in sizes.items() if key not in seen) + partial,
            own_bytes=sum(n for key, n in sizes.items() if owners[key] == 1) + partial,
            missing_bytes=contents.missing_bytes,
            repo=repository.repo,
            commit=revision.commit,
            references=revision.references,
            aliases=aliases,
            format=about.format,
            architecture=about.architecture,
            quantization=about.quantization,
            writer=writer if contents.state != "complete" else "",
            verified=last_verified(revision.folder, read) if is_whole else None,
            files=contents.files,
        )
        seen.update(sizes)


@cache
def _aliases() -> dict[str, tuple[str, ...]]:
    """Return the aliases of each repository of the catalog."""
    found: dict[str, tuple[str, ...]] = {}
    for entry in catalog().values():
        if isinstance(entry.source, HubSource):
            found[entry.source.repo] = (*found.get(entry.source.repo, ()), entry.alias)
    return found


@dataclass(frozen=True, slots=True)
class RevisionParts:
    """A revision with its record, what it lacks, and the unfinished files that belong to it."""

    revision: CachedRevision
    record: SnapshotRecord | None
    leftovers: tuple[Leftover, ...]
    contents: Contents


def revision_parts(repository: CachedRepository) -> list[RevisionParts]:
    """Examine all revisions, and give each its unfinished files.

    An unfinished file is of the first revision that must have its content and lacks it. If no
    record tells that, it is of the only incomplete revision.
    """
    waiting = list(repository.leftovers)
    found = []
    for revision in repository.revisions:
        record = recorded_snapshot(revision.folder)
        wanted = {file.blob_name for file in record.files} if record is not None else set()
        there = {file.blob.name for file in revision.files if file.blob and file.identity}
        own = [each for each in waiting if each.blob_name in wanted - there]
        waiting = [each for each in waiting if each not in own]
        found.append(_parts(revision, record, own))
    unfinished = [part for part in found if part.contents.state in ("incomplete", "config")]
    if waiting and len(unfinished) == 1:
        index = found.index(unfinished[0])
        own = [*unfinished[0].leftovers, *waiting]
        found[index] = _parts(unfinished[0].revision, unfinished[0].record, own)
    return found


def _parts(
    revision: CachedRevision, record: SnapshotRecord | None, blobs: Sequence[Leftover]
) -> RevisionParts:
    inside = set(revision.leftovers)
    leftovers = (*(each for each in blobs if each not in inside), *revision.leftovers)
    present = {file.name: file.nbytes for file in revision.files if file.identity}
    broken = sum(file.identity is None for file in revision.files)
    contents = contents_of(revision.folder, present, broken, record, partial_sizes(leftovers))
    return RevisionParts(revision, record, leftovers, contents)


def partial_sizes(leftovers: Iterable[Leftover]) -> dict[str, int]:
    """Return the bytes of unfinished files, by hash or else by name; journals do not count."""
    return {
        each.blob_name or each.path.name[1:].rpartition(".")[0]: each.nbytes
        for each in leftovers
        if not each.path.name.endswith((".journal", ".k2-journal", ".k2-link"))
    }


def _unlisted_bytes(repository: CachedRepository, parts: Sequence[RevisionParts]) -> int:
    """Return the bytes of contents without a revision, and of unfinished files without one."""
    linked = owner_counts([repository])
    alone = {b.identity: b.nbytes for b in repository.blobs if b.identity not in linked}
    given = {each for part in parts for each in part.leftovers}
    lost = sum(each.nbytes for each in repository.leftovers if each not in given)
    return sum(alone.values()) + lost


def _typed_name(
    repository: CachedRepository,
    revision: CachedRevision,
    aliases: Sequence[str],
    record: SnapshotRecord | None,
) -> str:
    """Return what a user types for a revision."""
    for alias in aliases:
        source = catalog()[alias].source
        pinned = source.revision if isinstance(source, HubSource) else None
        if (pinned or "main") in (revision.commit, *revision.references):
            return alias
    if "main" in revision.references:
        return repository.repo
    if revision.references:
        return f"{repository.repo}@{revision.references[0]}"
    if record is not None and record.written_by == "k2" and not _is_known(repository, record):
        # A download that was interrupted, which sets its branch at its end.
        main = record.revision == "main"
        return repository.repo if main else f"{repository.repo}@{record.revision}"
    return f"{repository.repo}@{revision.commit}"


def _is_known(repository: CachedRepository, record: SnapshotRecord) -> bool:
    return any(name == record.revision for name, _ in repository.references)
