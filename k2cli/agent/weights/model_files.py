"""List of the files of a model on a machine, and its name on other machines."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from k2cli.agent.weights.messages import ModelFiles, Target, WeightsFile
from k2cli.agent.weights.place import is_known_name
from k2cli.errors import K2Error
from k2cli.models.checkpoint import Checkpoint, read_checkpoint
from k2cli.models.digests import sha256_of
from k2cli.models.layout import INDEX_NAME, names_in, supporting_files
from k2cli.models.part import absent_files
from k2cli.models.reference import (
    SOURCE_NAME,
    ModelReference,
    local_checkpoint,
    parse_reference,
)
from k2cli.models.sources.snapshot_record import recorded_snapshot
from k2cli.settings import models_directory

_TEMPLATES = "additional_chat_templates"


def model_files(reference: str) -> ModelFiles:
    """List the files of a model on this machine, or say why it cannot be sent from here."""
    try:
        parsed = parse_reference(reference)
        folder = local_checkpoint(reference, part=True)
        checkpoint = read_checkpoint(folder)
        files = list_files(folder, checkpoint, parsed)
    except K2Error as error:
        return ModelFiles(problem=error.message)
    except OSError as error:
        return ModelFiles(problem=f"cannot read {error.filename}: {error.strerror}")
    return ModelFiles(
        str(folder),
        target_of(reference, parsed, folder),
        files,
        absent_files(folder),
        header_lengths(checkpoint),
        record=recorded_snapshot(folder),
    )


def target_of(text: str, reference: ModelReference, folder: Path) -> Target:
    """Return the place of a model in terms that hold on every machine."""
    if reference.repo is not None and folder.parent.name == "snapshots":
        return Target("hub", reference.repo, folder.name, _references(reference, folder))
    entry = reference.entry
    if entry is not None and folder == models_directory() / entry.alias:
        return Target("alias", entry.alias)
    if reference.modelscope_repo is not None and folder.parent == models_directory():
        return Target("alias", folder.name)
    if text.startswith("~/"):
        return Target("path", text.rstrip("/"))
    return Target("path", str(folder.absolute()))


def _references(reference: ModelReference, folder: Path) -> tuple[str, ...]:
    """Return the branch or tag by which the Hub's cache knows the snapshot, if it does."""
    name = reference.revision or "main"
    path = folder.parent.parent / "refs" / name
    return (name,) if name != folder.name and path.is_file() else ()


def list_files(
    folder: Path, checkpoint: Checkpoint, reference: ModelReference
) -> tuple[WeightsFile, ...]:
    """List the files that loading reads, with those that are here alone.

    Raises:
        K2Error: if a weight file has a name that k2 does not send.
        OSError: if a file cannot be examined.
    """
    weights = sorted({t.file.name for t in checkpoint.tensors.values()} - checkpoint.absent)
    if odd := [name for name in weights if not is_known_name(name)]:
        raise K2Error(f"{folder / odd[0]} has a name that k2 does not send")
    templates = folder / _TEMPLATES
    names = names_in(folder)
    if templates.is_dir():
        names += [f"{_TEMPLATES}/{name}" for name in names_in(templates)]
    small = [name for name in (INDEX_NAME, SOURCE_NAME) if (folder / name).is_file()]
    small += supporting_files(names)
    hub = reference.repo is not None
    return tuple(_describe(folder / name, name, hub) for name in (*small, *weights))


def _describe(path: Path, name: str, hub: bool) -> WeightsFile:
    found = path.stat()
    blob = ""
    if hub and path.is_symlink():
        data = Path(os.readlink(path))
        blob = data.name if data.parent.name == "blobs" else ""
    return WeightsFile(name, found.st_size, blob, found.st_mtime_ns)


def header_lengths(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the length of the header of each weight file: its first tensor follows it."""
    starts: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        name = tensor.file.name
        starts[name] = min(starts.get(name, tensor.offset), tensor.offset)
    return starts


def digests(folder: str, *names: str) -> dict[str, str]:
    """Return the SHA-256 of files of a folder, by name.

    Raises:
        OSError: if one cannot be read.
    """
    known = [name for name in names if is_known_name(name)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: sha256_of(Path(folder) / name), known)
        return dict(zip(known, found, strict=True))
