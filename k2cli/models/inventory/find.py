"""The folder of a model for verification: complete or not, and what is known about its files."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from k2cli.errors import K2Error, UsageError
from k2cli.files import read_regular
from k2cli.models.inventory.writers import download_locks, is_held, receiving_lock
from k2cli.models.reference import (
    ModelReference,
    local_checkpoint,
    modelscope_folder,
    parse_reference,
    present_folder,
)
from k2cli.models.sources.cache_layout import (
    CacheLayout,
    FolderLayout,
    Layout,
    is_whole,
    repository_folder,
)
from k2cli.models.sources.file_names import is_safe_name
from k2cli.models.sources.snapshot_record import (
    SnapshotRecord,
    begun_commit,
    record_path,
    recorded_snapshot,
)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model on this machine, with the record of its files if there is one."""

    text: str
    revision: str | None
    reference: ModelReference
    folder: Path
    record: SnapshotRecord | None

    @property
    def layout(self) -> Layout:
        """Places of its files."""
        if self.folder.parent.name == "snapshots":
            repo = self.record.repo if self.record is not None else ""
            return CacheLayout(repo, self.folder.name, self.folder.parent.parent)
        return FolderLayout(self.folder, self.record.commit if self.record is not None else "")

    def command(self, verb: str, *options: str) -> str:
        """Return the command line of a verb for this model."""
        revision = ["--revision", self.revision] if self.revision is not None else []
        return shlex.join(["k2", *verb.split(), self.text, *revision, *options])


def find_model(text: str, revision: str | None = None) -> KnownModel:
    """Find a model on this machine, also one of which files are missing.

    Args:
        text: the model reference.
        revision: branch, tag or commit; overrides that of the reference.

    Raises:
        UsageError: if it is no model reference, or one without revisions.
        K2Error: if nothing of it is here, or it is being transferred to this machine.
    """
    reference = parse_reference(text)
    if revision is not None:
        if reference.repo is None and reference.modelscope_repo is None:
            raise UsageError(f"'{text}' has no revisions", "leave --revision out")
        if not is_safe_name(revision):
            raise UsageError(f"'{revision}' is no name of a revision", "--revision main")
        reference = replace(reference, revision=revision)
    folder: Path | None
    if reference.repo is not None:
        folder = _snapshot_folder(reference.repo, reference.revision)
    elif reference.modelscope_repo is not None:
        folder = modelscope_folder(reference.modelscope_repo, reference.revision)
    else:
        folder = present_folder(reference)
    model = KnownModel(text, revision, reference, folder or Path(), None)
    if folder is None:
        raise K2Error(f"model '{text}' is not on this machine", model.command("download"))
    record = recorded_snapshot(folder)
    model = replace(model, record=record)
    _refuse_while_transferred(model)
    if not folder.is_dir() and not record_path(folder).is_file():
        raise K2Error(f"model '{text}' is not on this machine", model.command("download"))
    if record is None:
        local_checkpoint(text, part=True)  # it says what is missing
    return model


def complete_folder(text: str) -> Path:
    """Return the folder of a model on this machine, all of whose files have their length.

    Raises:
        UsageError: if it is no model reference.
        K2Error: if it is not here, or not complete; the hint is the command that completes it.
    """
    folder = local_checkpoint(text)
    record = recorded_snapshot(folder)
    if record is not None:
        lacking = [file for file in record.files if not is_whole(folder / file.name, file)]
        if lacking:
            count = f"{len(lacking)} of {len(record.files)} files"
            model = KnownModel(text, None, parse_reference(text), folder, record)
            raise K2Error(
                f"model '{text}' is not complete on this machine: {count} missing or of another "
                "length",
                model.command("models verify", "--repair"),
            )
    return folder


def _snapshot_folder(repo: str, revision: str | None) -> Path:
    """Return the folder that a revision would have in the cache of the Hub library."""
    base, commit = repository_folder(repo), revision or "main"
    if not is_safe_name(commit):
        raise UsageError(f"'{commit}' is no name of a revision", f"{repo}@main")
    try:
        found = read_regular(base / "refs" / commit, 200).decode().strip()
    except (OSError, UnicodeDecodeError):
        found = begun_commit(base, commit)
    if is_safe_name(found) and "/" not in found:
        commit = found
    return base / "snapshots" / commit.replace("/", "--")


def _refuse_while_transferred(model: KnownModel) -> None:
    """Refuse a model whose files a download is fetching, or another machine is sending.

    Raises:
        K2Error: if that is so.
    """
    if model.record is not None:
        places = model.layout.places(list(model.record.files), write=False)
        locks = [place.lock for place in places]
    else:
        locks = list(download_locks(model.folder))
    verify = model.command("models verify")
    for running, what in (
        (any(map(is_held, locks)), f"a download of '{model.text}' is running"),
        (is_held(receiving_lock(model.folder)), f"another machine is sending '{model.text}' here"),
    ):
        if running:
            raise K2Error(what, f"wait until it has ended, and then: {verify}")
