"""Model references: what a user may type for MODEL, and the folder that it stands for here.

A reference is an alias of the catalog (``demo``), a Hub repository (``owner/name`` with an
optional ``@revision``) or a local path (a checkpoint folder or a .gguf file). Nothing here
downloads weights: ``local_checkpoint`` finds what is on this machine or says how to fetch it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k2cli.errors import K2Error, UsageError
from k2cli.models.catalog import CatalogEntry, HubSource, WheelSource, catalog
from k2cli.models.checkpoint import read_json_object
from k2cli.settings import models_directory

# The Hub's own rule for names, and git's characters for a revision.
_REPO_PATTERN = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)


_SHOWN_NAMES, _SHOWN_CHARACTERS = 4, 100
"""In messages: as many names of models at most, and of what was typed."""

SOURCE_NAME = "k2-source.json"
"""In a folder that k2 converted: what it was converted from."""


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A parsed reference.

    ``path`` is set for local ones; ``repo`` and ``revision`` for the Hub, and for an alias that
    stands for a Hub repository.
    """

    text: str
    kind: Literal["alias", "hub", "local"]
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    @property
    def entry(self) -> CatalogEntry | None:
        """The catalog's entry, for an alias."""
        return catalog()[self.text.lower()] if self.kind == "alias" else None


def parse_reference(text: str) -> ModelReference:
    """Decide what ``text`` names. An alias wins over a folder of that name: write ``./demo``.

    Raises:
        UsageError: if it is no alias, no existing path and no Hub repository's name.
    """
    if entry := catalog().get(text.lower()):
        if isinstance(entry.source, HubSource):
            return ModelReference(
                text, "alias", repo=entry.source.repo, revision=entry.source.revision
            )
        return ModelReference(text, "alias")
    path = Path(text).expanduser()
    if text and _exists(path):
        if path.name == "config.json" and path.is_file():
            path = path.parent  # a bare config is a checkpoint of which nothing else is here
        _check_local(text, path)
        return ModelReference(text, "local", path=path)
    if text.startswith((".", "/", "~")) or text.endswith((".gguf", "/")):
        raise UsageError(f"there is no folder or .gguf file '{text}'", "check the path")
    if match := _REPO_PATTERN.fullmatch(text):
        return ModelReference(text, "hub", repo=match["repo"], revision=match["revision"])
    raise _unknown(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or one with a NUL
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
    """Names that start or end as ``text`` does, else those spelt much like it."""
    names = list(catalog())
    if len(text) > 1 and (starts := [name for name in names if name.startswith(text)]):
        return starts
    last = text.rpartition("/")[2]
    return difflib.get_close_matches(last, names, n=_SHOWN_NAMES) or [
        name for name in names if last.endswith(f"-{name}")
    ]


def converted_folder(reference: ModelReference) -> Path | None:
    """Where k2 puts the checkpoint that it converts for a reference; None if it converts none."""
    if reference.entry is not None and reference.repo is None:
        return models_directory() / reference.entry.alias
    if reference.path is not None and reference.path.is_file():
        # Two files of one name, in different folders, must not displace one another.
        place = hashlib.sha256(str(reference.path.resolve()).encode()).hexdigest()[:8]
        return models_directory() / f"{reference.path.stem}-{place}"
    return None


def conversion_source(reference: ModelReference) -> dict[str, Any] | None:
    """What identifies the GGUF of a reference that k2 converts; None if it converts none.

    A digest where the catalog pins one, else the file's path, size and time of change.
    """
    if reference.entry is not None and isinstance(reference.entry.source, WheelSource):
        digest = reference.entry.source.member_sha256
        return {"sha256": digest, "sampling": dict(reference.entry.sampling)}
    if reference.path is None or not reference.path.is_file():
        return None
    status = reference.path.stat()
    return {
        "path": str(reference.path.resolve()),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }


def is_conversion_of(folder: Path, source: dict[str, Any]) -> bool:
    """Whether k2 converted ``folder`` from just that GGUF."""
    path = folder / SOURCE_NAME
    return path.is_file() and read_json_object(path) == source


def local_checkpoint(text: str) -> Path:
    """The folder on this machine with ``config.json`` and safetensors that ``text`` stands for.

    Raises:
        UsageError: if ``text`` is no reference.
        K2Error: if the model is not here yet; the hint is the command that fetches it.
    """
    reference = parse_reference(text)
    folder = present_folder(reference)
    if folder is None:
        raise K2Error(f"model '{text}' is not on this machine", f"k2 download {text}")
    if not (folder / "config.json").is_file():
        raise K2Error(f"'{text}' has no config.json", "give the folder of a checkpoint")
    if not any(folder.glob("*.safetensors")):
        hint = None if reference.kind == "local" else f"k2 download {text}"
        raise K2Error(f"'{text}' has a config.json but no .safetensors files", hint)
    return folder


def present_folder(reference: ModelReference) -> Path | None:
    """The reference's folder if it is on this machine, as far as its name tells."""
    if reference.path is not None and reference.path.is_dir():
        return reference.path
    source, folder = conversion_source(reference), converted_folder(reference)
    if source is not None and folder is not None:
        return folder if is_conversion_of(folder, source) else None
    if reference.repo is None:
        return None
    from k2cli.models.sources import hub

    return hub.cached_folder(reference.repo, reference.revision)


def is_path(reference: str) -> bool:
    """Whether a model is meant by its folder or file, here or, if it is not here, on a node."""
    from k2cli.models.reference import parse_reference

    return reference.startswith(("/", "~")) or parse_reference(reference).path is not None
