"""Model references, as a user types them for MODEL, and their folders on this machine.

A reference is an alias of the catalog (``demo``), a Hub repository (``owner/name`` with an
optional ``@revision``), one of ModelScope (``modelscope:owner/name``) or a local path (a checkpoint
folder or a .gguf file). Nothing is downloaded: ``local_checkpoint`` finds the folder on this
machine or tells how to fetch it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k2cli.errors import K2Error, UsageError
from k2cli.files import name_with
from k2cli.models.catalog import CatalogEntry, HubSource, WheelSource, catalog
from k2cli.models.json_files import read_json_if_present
from k2cli.models.layout import (
    is_own,
    names_in,
    no_safetensors_error,
    split_parts,
    weights_without_index,
)
from k2cli.models.part import absent_files
from k2cli.settings import models_directory
from k2cli.units import format_bytes

# The Hub's rule for names, and the characters that git allows in a revision.
_REPO_PATTERN = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)


_SHOWN_NAMES, _SHOWN_CHARACTERS = 4, 100
"""Limits for messages: names of models, and characters of the given text."""

MODELSCOPE = "modelscope:"
"""Start of a reference to a repository of ModelScope."""

SOURCE_NAME = "k2-source.json"
"""File in a converted folder that records its source."""


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A parsed reference.

    ``path`` is set for local references; ``repo`` and ``revision`` for Hub repositories, and for
    an alias of one; ``modelscope_repo`` and ``revision`` for repositories of ModelScope.
    """

    text: str
    kind: Literal["alias", "hub", "modelscope", "local"]
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    modelscope_repo: str | None = None

    @property
    def entry(self) -> CatalogEntry | None:
        """Catalog entry of an alias; None for other references."""
        return catalog()[self.text.lower()] if self.kind == "alias" else None


def parse_reference(text: str) -> ModelReference:
    """Parse a reference. An alias has precedence over a folder: write ``./demo`` for the folder.

    Raises:
        UsageError: if it is not an alias, an existing path or the name of a Hub repository.
    """
    if entry := catalog().get(text.lower()):
        if isinstance(entry.source, HubSource):
            return ModelReference(
                text, "alias", repo=entry.source.repo, revision=entry.source.revision
            )
        return ModelReference(text, "alias")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"'{text}' names no folder: {error}", "write the whole path") from None
    if text.startswith(MODELSCOPE):
        return _modelscope(text)
    if text and _exists(path):
        if path.name == "config.json" and path.is_file():
            path = path.parent  # a config without its checkpoint
        _check_local(text, path)
        first = split_parts(path)[0]  # any part of a split GGUF stands for all of it
        return ModelReference(text, "local", path=first if first.is_file() else path)
    if text.startswith((".", "/", "~")) or text.endswith((".gguf", "/")):
        raise UsageError(f"there is no folder or .gguf file '{text}'", "check the path")
    if match := _REPO_PATTERN.fullmatch(text):
        return ModelReference(text, "hub", repo=match["repo"], revision=match["revision"])
    raise _unknown(text)


def _modelscope(text: str) -> ModelReference:
    match = _REPO_PATTERN.fullmatch(text.removeprefix(MODELSCOPE))
    if match is None:
        raise UsageError(f"'{text}' is not {MODELSCOPE}owner/name", f"{MODELSCOPE}Qwen/Qwen3-0.6B")
    return ModelReference(
        text, "modelscope", revision=match["revision"], modelscope_repo=match["repo"]
    )


def modelscope_folder(repo: str, revision: str | None) -> Path:
    """Return the folder of a repository of ModelScope: k2's own, one for each named revision."""
    name = f"modelscope--{repo.replace('/', '--')}"
    name += f"@{revision.replace('/', '--')}" if revision is not None else ""
    return models_directory() / name_with(name, "")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long or has a NUL
        return False


def _check_local(text: str, path: Path) -> None:
    if path.is_dir() or path.suffix.lower() == ".gguf":
        return
    raise UsageError(
        f"'{text}' is a file, but not a .gguf file",
        "give the checkpoint's folder, the one with config.json",
    )


def _unknown(text: str) -> UsageError:
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    close = _close_names(text.lower())
    if close:
        quoted = ", ".join(f"'{name}'" for name in close[:_SHOWN_NAMES])
        more = f" or one of {len(close) - _SHOWN_NAMES} more" if len(close) > _SHOWN_NAMES else ""
        guess = f"did you mean {quoted}{more}? "
    else:
        families = dict.fromkeys(name.partition("-")[0].partition(".")[0] for name in catalog())
        guess = f"names that k2 knows start with {', '.join(families)}; "
    return UsageError(
        f"there is no model '{shown}'",
        f"{guess}also owner/name of a Hub repository, a checkpoint folder or a .gguf file",
    )


def _close_names(text: str) -> list[str]:
    """Return aliases that start or end with ``text``, or else are spelled similarly."""
    names = list(catalog())
    if len(text) > 1 and (starts := [name for name in names if name.startswith(text)]):
        return starts
    last = text.rpartition("/")[2]
    return difflib.get_close_matches(last, names, n=_SHOWN_NAMES) or [
        name for name in names if last.endswith(f"-{name}")
    ]


def converted_folder(reference: ModelReference) -> Path | None:
    """Return the folder for a reference's converted checkpoint; None if it needs no conversion."""
    if reference.entry is not None and reference.repo is None:
        return models_directory() / reference.entry.alias
    if reference.path is not None and reference.path.is_file():
        # Files of the same name in different folders need different targets.
        place = hashlib.sha256(str(reference.path.resolve()).encode()).hexdigest()[:8]
        return models_directory() / f"{reference.path.stem}-{place}"
    return None


def conversion_source(reference: ModelReference) -> dict[str, Any] | None:
    """Return the identity of the GGUF to convert; None if the reference needs no conversion.

    The identity is the digest in the catalog, or else the file's path, size and change time.
    """
    if reference.entry is not None and isinstance(reference.entry.source, WheelSource):
        digest = reference.entry.source.member_sha256
        return {"sha256": digest, "sampling": dict(reference.entry.sampling)}
    if reference.path is None or not reference.path.is_file():
        return None
    found = [part.stat() for part in split_parts(reference.path) if part.is_file()]
    if not found:  # the number in its name is not one of the series
        return None
    return {
        "path": str(reference.path.resolve()),
        "bytes": sum(status.st_size for status in found),
        "modified_ns": max(status.st_mtime_ns for status in found),
    }


def is_conversion_of(folder: Path, source: dict[str, Any]) -> bool:
    """Return True if ``folder`` was converted from that GGUF."""
    path = folder / SOURCE_NAME
    return read_json_if_present(path) == source


def local_checkpoint(text: str, *, part: bool = False) -> Path:
    """Return the checkpoint folder on this machine that ``text`` refers to.

    With ``part``, it may lack weight files whose headers are there (``models.part``).

    Raises:
        UsageError: if ``text`` is not a model reference.
        K2Error: if the model is not on this machine; the hint is the command that fetches it.
    """
    reference = parse_reference(text)
    folder = present_folder(reference, part=part)
    if folder is None:
        state = "not complete" if _is_begun(reference) else "not"
        raise K2Error(f"model '{text}' is {state} on this machine", f"k2 download {text}")
    names = names_in(folder)
    if "config.json" not in names:
        raise without_config(text, names)
    if not weights_without_index(names):
        if reference.kind != "local":
            hint = f"k2 download {text}"
            raise K2Error(f"'{text}' has a config.json but no .safetensors files", hint)
        raise no_safetensors_error(names, text, None)
    if not part and (absent := absent_files(folder)):
        raise K2Error(
            f"'{text}' on this machine is only the part that a launch needs here: it lacks "
            f"{len(absent)} weight files, {format_bytes(sum(absent.values()))}",
            f"k2 download {text}",
        )
    return folder


def _is_begun(reference: ModelReference) -> bool:
    """True if some files of a repository of the Hub are in its cache."""
    if reference.repo is None:
        return False
    from k2cli.models.sources import hub

    return hub.is_begun(reference.repo, reference.revision)


def without_config(text: str, names: Collection[str]) -> K2Error:
    """Return the error for a folder without ``config.json``, with these files."""
    if any(is_own(name) and name.endswith(".gguf") for name in names):
        return no_safetensors_error(names, text, None)
    return K2Error(f"'{text}' has no config.json", "give the folder of a checkpoint")


def present_folder(reference: ModelReference, *, part: bool = False) -> Path | None:
    """Return the reference's folder if it exists; its contents are not checked."""
    if reference.path is not None and reference.path.is_dir():
        return reference.path
    source, folder = conversion_source(reference), converted_folder(reference)
    if source is not None and folder is not None:
        return folder if is_conversion_of(folder, source) else None
    if reference.modelscope_repo is not None:
        from k2cli.models.sources.snapshot_record import record_path

        folder = modelscope_folder(reference.modelscope_repo, reference.revision)
        return folder if record_path(folder).is_file() else None
    if reference.repo is None:
        return None
    from k2cli.models.sources import hub

    return hub.cached_folder(reference.repo, reference.revision, part=part)


def is_path(reference: str) -> bool:
    """True if the text is a path: one that exists here, or one that may exist on a node."""
    return reference.startswith(("/", "~")) or parse_reference(reference).path is not None
