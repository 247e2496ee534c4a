"""Repair of a model: only what is damaged or missing is fetched, at the commit of its record.

A damaged file stays where it is until the new one is complete and verified, and is then replaced in
one step. An interrupted repair is continued like a download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from k2cli.errors import K2Error
from k2cli.files import unwritable
from k2cli.models.inventory.find import KnownModel
from k2cli.models.inventory.verified import state_of
from k2cli.models.inventory.verify import FileResult, Verification, concluded
from k2cli.models.sources.cache_layout import CachePlace
from k2cli.models.sources.events import Event, OnEvent
from k2cli.models.sources.parallel_download import FileFinished


def cannot_repair(model: KnownModel, found: Verification) -> K2Error | None:
    """Return the error if a repair has no source for the damaged files; None if it has one."""
    wrong = len(found.damaged)
    record = model.record
    if record is not None and record.repo and record.commit:
        without = [file.name for file in found.damaged if file.expected is None]
        if not without:
            return None
        return K2Error(
            f"'{model.text}' has damaged files that its record does not list: {without[0]}",
            f"move it away: {found.folder / without[0]}",
        )
    if model.reference.path is None or model.reference.path.is_file():
        # k2 converts it anew if its headers are damaged.
        hint = model.command("download")
    elif record is not None and record.commit:
        hint = f"k2 download OWNER/NAME --revision {record.commit} --to {found.folder}"
    else:
        hint = "copy the named files again from where the folder came from"
    return K2Error(f"'{model.text}' has {wrong} damaged files, and no known source", hint)


def repair(model: KnownModel, found: Verification, on_event: OnEvent) -> Verification:
    """Repair what a verification found, and return the new state of the model.

    Raises:
        NotAuthorisedError: if the server denies access.
        K2Error: if a file cannot be fetched or written, or has no known source.
        KeyboardInterrupt: what is complete by then is repaired.
    """
    if (without_source := cannot_repair(model, found)) is not None:
        raise without_source
    results = {file.name: file for file in found.files}
    try:
        for name in _link(model, found.damaged):
            results[name] = _repaired(model, results[name])
    except OSError as error:
        raise unwritable(error, found.folder) from error
    broken = [file for file in found.damaged if file.status != "not linked"]
    if broken:
        _fetch(model, broken, results, on_event)
    return concluded(found.folder, model.record, results.values())


def _link(model: KnownModel, files: Sequence[FileResult]) -> list[str]:
    """Link files whose data are in the cache; return their names."""
    unlinked = [file.expected for file in files if file.status == "not linked" and file.expected]
    linked = []
    for place in model.layout.places(unlinked, write=True) if unlinked else ():
        if isinstance(place, CachePlace):
            place.link()
            linked.append(place.file.name)
    return linked


def _fetch(
    model: KnownModel,
    broken: Sequence[FileResult],
    results: dict[str, FileResult],
    on_event: OnEvent,
) -> None:
    from k2cli.models.inventory.fetch_again import fetch_again

    def show(event: Event) -> None:
        if isinstance(event, FileFinished):
            name = event.file.name
            results[name] = _repaired(model, replace(results[name], expected=event.file))
        on_event(event)

    assert model.record is not None  # cannot_repair has found it
    files = [file.expected for file in broken if file.expected is not None]
    states = {file.name: file.state for file in broken}

    def is_broken(name: str) -> bool:
        """True if a file is still the one that was found to be damaged."""
        state = states.get(name)
        return state is not None and state.is_of(model.folder / name)

    fetch_again(model.record, files, model.layout, is_broken, show)


def _repaired(model: KnownModel, file: FileResult) -> FileResult:
    expected = file.expected
    path = model.folder / file.name
    state = state_of(path, expected.blob_name, "verify") if expected else None
    nbytes = expected.nbytes if expected else file.nbytes
    return replace(file, status="repaired", reason="", nbytes=nbytes, state=state)
