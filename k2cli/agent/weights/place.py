"""The folder of a transferred model on this machine, and the check of the names of its files.

Names come from another machine: none may leave the folder, and only known kinds of files are taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from k2cli.agent.weights.messages import (
    MAX_FILE_BYTES,
    MAX_FILES,
    Offer,
    Target,
    WeightsFile,
)
from k2cli.errors import K2Error, UsageError
from k2cli.files import MAX_NAME_BYTES
from k2cli.models.catalog import catalog
from k2cli.models.layout import INDEX_NAME, is_own, supporting_files
from k2cli.models.part import FOLDER
from k2cli.models.reference import SOURCE_NAME
from k2cli.models.sources.file_names import folded_name, is_safe_name
from k2cli.models.sources.snapshot_record import SnapshotRecord
from k2cli.settings import models_directory

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9A-Za-z][\w.-]{0,199}", re.ASCII)
_REFERENCE = re.compile(r"[0-9A-Za-z][\w-]*(?:[./][\w-]+){0,20}", re.ASCII)
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MODELSCOPE = re.compile(r"modelscope--[\w.@-]{1,240}", re.ASCII)
_MAX_REFERENCES = 20


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of a model; ``blobs`` and ``references`` are the Hub cache's, None elsewhere."""

    folder: Path
    blobs: Path | None = None
    references: Path | None = None


def place_of(target: Target) -> Place:
    """Return the place of a model on this machine.

    Raises:
        UsageError: if the target is not one that k2 sends.
    """
    if target.kind == "hub":
        return _hub_place(target)
    if target.kind == "alias":
        known = target.name in catalog() or _MODELSCOPE.fullmatch(target.name)
        if not known or not is_own(target.name):
            raise UsageError(f"'{target.name}' is no model in k2's own folder")
        return Place(models_directory() / target.name)
    path = Path(target.name)
    if target.name.startswith("~/"):
        path = path.expanduser()
    if not path.is_absolute() or ".." in path.parts or path == Path("/"):
        raise UsageError(f"'{target.name}' is not the whole path of a folder")
    return Place(path)


def _hub_place(target: Target) -> Place:
    references = target.references
    fitting = all(_REFERENCE.fullmatch(text) and len(text) <= 200 for text in references)
    if not (
        _REPO.fullmatch(target.name)
        and _COMMIT.fullmatch(target.commit)
        and fitting
        and len(references) <= _MAX_REFERENCES
    ):
        raise UsageError(f"'{target.name}' at '{target.commit}' is not a revision of a repository")
    from k2cli.models.sources.cache_layout import repository_folder

    base = repository_folder(target.name)
    return Place(base / "snapshots" / target.commit, base / "blobs", base / "refs")


def is_known_name(name: str) -> bool:
    """True for a file that a model has: weights, their index, config, tokenizer, templates."""
    plain = name.removeprefix(f"{FOLDER}/")
    if not name.isprintable() or len(plain.encode(errors="replace")) > MAX_NAME_BYTES:
        return False
    if is_own(plain) and plain.endswith(".safetensors") and len(plain) > len(".safetensors"):
        return True
    return name in (INDEX_NAME, SOURCE_NAME) or bool(supporting_files([name]))


def check_offer(offer: Offer) -> None:
    """Refuse names and sizes that no model has.

    Raises:
        UsageError: naming the first.
    """
    if len(offer.files) + len(offer.absent) > MAX_FILES:
        raise UsageError(f"the model has {len(offer.files)} files; k2 takes {MAX_FILES}")
    seen: dict[str, str] = {}
    sizes = [(file.name, file.nbytes) for file in offer.files] + list(offer.absent.items())
    for name, nbytes in sizes:
        if not is_known_name(name):
            raise UsageError(f"'{name}' is no file of a model that k2 takes")
        if not 0 <= nbytes <= MAX_FILE_BYTES:
            raise UsageError(f"'{name}' cannot have {nbytes} bytes")
        # A disk that ignores case, or the form of accents, would give both the same file.
        if (other := seen.setdefault(folded_name(name), name)) != name:
            raise UsageError(
                f"'{name}' and '{other}' differ only in the case of letters or the form of accents"
            )
    if len(seen) < len(sizes):
        raise UsageError("a file is offered twice")
    for file in offer.files:
        if file.blob and not _BLOB.fullmatch(file.blob):
            raise UsageError(f"'{file.blob}' is no name of the Hub's cache")


def record_of(offer: Offer) -> SnapshotRecord | None:
    """Return the record of the offered files, to be kept beside them; None if there is none.

    Raises:
        UsageError: if it is that of another model, or cannot be one.
    """
    record, target = offer.record, offer.target
    if record is None:
        return None
    if target.kind == "hub" and (record.repo, record.commit) != (target.name, target.commit):
        raise UsageError(f"the record of '{target.name}' is that of '{record.repo}'")
    if not (_REPO.fullmatch(record.repo) and _COMMIT.fullmatch(record.commit)):
        return None  # such as that of a folder whose origin is not known
    sizes = {file.name: file.nbytes for file in offer.files}
    files = tuple(
        file
        for file in record.files
        if sizes.get(file.name) == file.nbytes and _BLOB.fullmatch(file.blob_name)
    )
    revision = record.revision if is_safe_name(record.revision) else record.commit
    whole = record.whole and not offer.absent
    return msgspec.structs.replace(record, files=files, revision=revision, whole=whole)


def check_folder(place: Place, files: Sequence[WeightsFile], absent: Sequence[str]) -> None:
    """Refuse a folder that has weights of another model, or a subfolder that leads elsewhere.

    Raises:
        K2Error: naming the file.
    """
    folder = place.folder
    if folder.exists() and not folder.is_dir():
        raise K2Error(f"{folder} is not a folder")
    wanted = {file.name for file in files} | set(absent)
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        if path.name not in wanted and is_own(path.name):
            raise K2Error(
                f"{folder} has {path.name}, which is not of this model",
                f"move it away: {path}",
            )
    for parent in {(folder / file.name).parent for file in files} - {folder}:
        if parent.is_symlink():
            raise K2Error(f"{parent} is a link, and k2 writes through none")
