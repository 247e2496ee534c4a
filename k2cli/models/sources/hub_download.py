"""Download of files of a repository: what is missing, room for it, transfer, and the record.

The repository is one of the Hub or of ModelScope.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2cli.errors import K2Error
from k2cli.files import unwritable
from k2cli.models import modelscope
from k2cli.models.checkpoint import read_index
from k2cli.models.inventory.known_folders import remember_folder
from k2cli.models.inventory.verified import FileState, note_states, state_of
from k2cli.models.layout import INDEX_NAME, no_safetensors_error
from k2cli.models.sources import hub
from k2cli.models.sources.byte_source import ByteSource, FolderSource
from k2cli.models.sources.cache_layout import (
    CacheLayout,
    CachePlace,
    FolderLayout,
    FolderPlace,
    Layout,
    is_whole,
    missing_bytes,
)
from k2cli.models.sources.events import Event, OnEvent, StepStarted
from k2cli.models.sources.file_names import check_names
from k2cli.models.sources.http_source import HttpSource
from k2cli.models.sources.hub_headers import read_weight_map
from k2cli.models.sources.parallel_download import FileFinished, ParallelDownload, Place
from k2cli.models.sources.range_stream import DownloadOptions
from k2cli.models.sources.selection import Selection, choose_files
from k2cli.models.sources.snapshot_record import SnapshotRecord, write_record
from k2cli.system.awake import kept_awake
from k2cli.system.disk import disk_use
from k2cli.units import format_bytes

Source = Literal["hub", "modelscope"]


@dataclass(frozen=True, slots=True)
class FileToFetch:
    """File of a download, where it goes, and how many of its bytes are missing."""

    place: CachePlace | FolderPlace
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class HubDownload:
    """One download, decided but not begun: the commit is fixed, and so are the files."""

    listing: hub.Listing
    layout: Layout
    files: tuple[FileToFetch, ...]
    whole: bool

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(file.missing_bytes for file in self.files)

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.layout.folder

    @property
    def record(self) -> SnapshotRecord:
        """Record of the revision and its files."""
        listing, files = self.listing, tuple(file.place.file for file in self.files)
        return SnapshotRecord(
            listing.source, listing.repo, listing.revision, listing.commit, files, self.whole
        )


def plan_download(
    repo: str,
    revision: str | None,
    destination: Path | None,
    selection: Selection,
    source: Source = "hub",
) -> HubDownload:
    """Ask the server for the files of a revision, and find out what is missing; write nothing.

    Raises:
        NotAuthorisedError: if the repository is gated or private.
        UsageError: if the selection leaves nothing.
        K2Error: if the server cannot be reached, or the repository has no weights that k2 reads.
    """
    if source == "modelscope":
        listing = modelscope.list_repository(repo, revision)
    else:
        listing = hub.list_repository(repo, revision)
    layout = _layout(listing, destination)
    chosen = choose_files(listing.sizes, _weight_map(listing, layout), repo, selection)
    if not chosen.names:
        raise no_safetensors_error(listing.sizes, repo, repo)
    return _planned(listing, layout, chosen.names, whole=chosen.whole)


def _layout(listing: hub.Listing, destination: Path | None) -> Layout:
    if destination is not None:
        return FolderLayout(destination, listing.commit)
    return CacheLayout(listing.repo, listing.commit)


def _weight_map(listing: hub.Listing, layout: Layout) -> dict[str, str] | None:
    """Read the index of the commit, from this machine if it is here."""
    if INDEX_NAME in listing.sizes and listing.hashes.get(INDEX_NAME):
        (place,) = layout.places([listing.expected(INDEX_NAME)], write=False)
        if place.is_there() and place.path.is_file():
            return read_index(layout.folder)
    if listing.source == "modelscope":
        return modelscope.read_weight_map(listing)
    return read_weight_map(listing.repo, listing.commit, listing.sizes)


def list_recorded(record: SnapshotRecord) -> hub.Listing:
    """List the files of the commit of a record.

    Raises:
        NotAuthorisedError: if the repository is gated or private.
        K2Error: if the server cannot be reached.
    """
    if record.source == "modelscope":
        return modelscope.list_recorded(record.repo, record.revision, record.commit)
    return hub.list_repository(record.repo, record.commit)


def with_hashes(listing: hub.Listing, names: Collection[str]) -> hub.Listing:
    """Complete the hashes of a listing; see ``hub.with_hashes``."""
    return listing if listing.source == "modelscope" else hub.with_hashes(listing, names)


def _planned(
    listing: hub.Listing, layout: Layout, names: Collection[str], *, whole: bool
) -> HubDownload:
    check_names(names, listing.repo)
    listing = with_hashes(listing, names)
    places = layout.places([listing.expected(name) for name in names], write=False)
    files = tuple(
        FileToFetch(place, 0 if place.is_there() else missing_bytes(place)) for place in places
    )
    return HubDownload(listing, layout, files, whole)


def run_download(
    download: HubDownload, options: DownloadOptions, on_event: OnEvent, *, xet: bool = False
) -> None:
    """Fetch what is missing, verify it, and record the revision and the hashes of its files.

    Args:
        xet: leave the transfer to the Hub library.

    Raises:
        NotAuthorisedError: if the Hub refuses a file.
        K2Error: if a file cannot be fetched or written; what has arrived stays.
        KeyboardInterrupt: likewise.
    """
    listing, layout = download.listing, download.layout
    files = [file.place.file for file in download.files]
    into = download.files[0].place.partial.parent
    check_free_space(into, download.missing_bytes, listing.repo, layout.folder)
    missing = sum(file.missing_bytes > 0 for file in download.files)
    if missing:
        count = f"{missing} file{'s' if missing > 1 else ''}"
        on_event(StepStarted(f"downloading {count} of {listing.repo}"))
    received: dict[str, FileState | None] = {}

    def noting(event: Event) -> None:
        if isinstance(event, FileFinished) and event.received:
            received[event.file.name] = state_of(event.path, event.file.blob_name, "download")
        on_event(event)

    try:
        # Before the transfer, so that it can be told what an interrupted one lacks.
        write_record(layout.folder, download.record)
        if isinstance(layout, FolderLayout):
            remember_folder(layout.folder, "download")
        with kept_awake():
            if xet:
                _with_library(download, on_event)
            else:
                places = layout.places(files, write=True)
                pairs: list[tuple[Place, ByteSource | None]] = [
                    (place, _cached_source(listing, layout, place)) for place in places
                ]
                transfer_from_server(listing, pairs, options, noting)
        layout.set_revision(listing.revision)
    except OSError as error:
        raise unwritable(error, layout.folder) from error
    finally:
        note_states(layout.folder, received)


def transfer_from_server(
    listing: hub.Listing,
    places: Sequence[tuple[Place, ByteSource | None]],
    options: DownloadOptions,
    on_event: OnEvent,
) -> None:
    """Transfer files to their places, each from its source; None stands for the server.

    Raises:
        NotAuthorisedError: if the server refuses a file.
        K2Error: if a file cannot be fetched or written.
    """
    if listing.source == "modelscope":
        service = modelscope.http_service(listing)
    else:
        service = hub.http_service(listing.repo, listing.commit)
    server = HttpSource(service, options.streams, options.read_timeout_seconds)
    try:
        pairs = [(place, source or server) for place, source in places]
        ParallelDownload(pairs, options, on_event).run()
    finally:
        server.close()


def _cached_source(
    listing: hub.Listing, layout: Layout, place: CachePlace | FolderPlace
) -> ByteSource | None:
    """Take a file for a folder from the cache, if it is there."""
    if isinstance(layout, CacheLayout) or listing.source != "hub":
        return None
    cached = CacheLayout(listing.repo, listing.commit).folder
    return FolderSource(cached) if is_whole(cached / place.file.name, place.file) else None


def _with_library(download: HubDownload, on_event: OnEvent) -> None:
    from k2cli.models.sources.events import BytesDone

    listing, layout = download.listing, download.layout
    for file in download.files:
        if file.missing_bytes:
            file.place.discard()
    hub.download_repo(
        listing.repo,
        listing.commit,
        [file.place.file.name for file in download.files],
        layout.folder if isinstance(layout, FolderLayout) else None,
        lambda done, total: on_event(BytesDone(done, total)),
    )


def check_free_space(folder: Path, needed_bytes: int, what: str, shown: Path | None = None) -> None:
    """Check that the volume of a folder has room for a download.

    Args:
        shown: the folder to name in the message.

    Raises:
        K2Error: if it has less.
    """
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = disk_use(existing).free
    except OSError as error:
        raise unwritable(error, shown or folder) from error
    if needed_bytes > free:
        raise K2Error(
            f"{what} needs {format_bytes(needed_bytes)} more, {shown or folder} has "
            f"{format_bytes(free)} free",
            f"make room, or: k2 download {shlex.quote(what)} --to FOLDER on a larger disk",
        )
