"""Fetching of damaged files anew: each one stays in its place until the new one is verified."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import open_regular, unwritable
from k2cli.models.sources import hub
from k2cli.models.sources.byte_source import ByteSource, FolderSource
from k2cli.models.sources.cache_layout import (
    CacheLayout,
    CachePlace,
    FolderPlace,
    Layout,
    missing_bytes,
)
from k2cli.models.sources.events import OnEvent, StepStarted
from k2cli.models.sources.expected_files import ExpectedFile, verify_file
from k2cli.models.sources.hub_download import (
    check_free_space,
    list_recorded,
    transfer_from_server,
    with_hashes,
)
from k2cli.models.sources.range_stream import DownloadOptions
from k2cli.models.sources.snapshot_record import SnapshotRecord
from k2cli.system.awake import kept_awake

IsBroken = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class RepairPlace:
    """Place of a file that is damaged or missing; see ``transfer.Place``.

    ``is_broken`` says whether the file is still the one that was found to be damaged.
    """

    place: CachePlace | FolderPlace
    is_broken: IsBroken

    @property
    def file(self) -> ExpectedFile:
        """The file."""
        return self.place.file

    @property
    def partial(self) -> Path:
        """Path of its partial content."""
        return self.place.partial

    @property
    def journal(self) -> Path:
        """Path of its journal."""
        return self.place.journal

    def try_lock(self) -> contextlib.ExitStack | None:
        """Take the lock of the file."""
        return self.place.try_lock()

    def find(self) -> Path | None:
        """Return the file's path if another process has repaired it meanwhile."""
        if self.is_broken(self.file.name) or verify_file(self.place.path, self.file) is not None:
            return None
        return self.place.path

    def put(self) -> Path:
        """Replace the damaged file by the new one, whose bytes are on the disk by then.

        Raises:
            K2Error: if a folder has another file by now, such as one that the user has put there.
        """
        path = self.place.path
        other = isinstance(self.place, FolderPlace) and os.path.lexists(path)
        if other and not self.is_broken(self.file.name):
            raise K2Error(f"'{path}' has changed during the repair", "run the command again")
        descriptor = open_regular(self.partial)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return self.place.put()


def fetch_again(
    record: SnapshotRecord,
    wanted: Sequence[ExpectedFile],
    layout: Layout,
    is_broken: IsBroken,
    on_event: OnEvent,
) -> None:
    """Fetch files of a recorded commit that are damaged or missing.

    Raises:
        NotAuthorisedError: if the repository is gated or private.
        K2Error: if the server has other contents than the record, or a file cannot be fetched.
    """
    on_event(StepStarted(f"asking for {record.repo} at {record.commit}"))
    listing = list_recorded(record)
    files = [_as_recorded(listing, file) for file in wanted]
    try:
        places = layout.places(files, write=True)
        missing = sum(missing_bytes(place) for place in places)
        check_free_space(places[0].partial.parent, missing, record.repo, layout.folder)
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        on_event(StepStarted(f"repairing {count} of {record.repo}"))
        pairs = [
            (RepairPlace(place, is_broken), _cached_source(record, layout, place.file))
            for place in places
        ]
        with kept_awake():
            transfer_from_server(listing, pairs, DownloadOptions(), on_event)
    except OSError as error:
        raise unwritable(error, layout.folder) from error


def _as_recorded(listing: hub.Listing, wanted: ExpectedFile) -> ExpectedFile:
    """Return what the server says about a file, which must be what the record says.

    Raises:
        K2Error: if it is not.
    """
    if wanted.name not in listing.sizes:
        raise K2Error(f"{listing.repo}@{listing.commit} has no file '{wanted.name}'")
    found = with_hashes(listing, [wanted.name]).expected(wanted.name)
    if found.blob_name != wanted.blob_name:
        raise K2Error(
            f"{listing.repo}@{listing.commit} has another content of '{wanted.name}' than the "
            f"record of this model: {found.blob_name[:12]}, not {wanted.blob_name[:12]}",
            "use another mirror: see HF_ENDPOINT" if listing.source == "hub" else None,
        )
    return found


def _cached_source(record: SnapshotRecord, layout: Layout, file: ExpectedFile) -> ByteSource | None:
    """Take a file for a folder from the cache, if it is there and not damaged, too."""
    if isinstance(layout, CacheLayout) or record.source != "hub":
        return None
    cached = CacheLayout(record.repo, record.commit).folder
    try:
        damage = verify_file(cached / file.name, file)
    except OSError:
        return None
    return FolderSource(cached) if damage is None else None
