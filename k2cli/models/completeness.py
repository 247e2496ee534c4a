"""Check that a model's folder has all files that loading reads, by their names alone."""

from __future__ import annotations

from pathlib import Path

from k2cli.errors import K2Error
from k2cli.models.checkpoint import read_index
from k2cli.models.layout import choose_weight_files, names_in
from k2cli.models.part import absent_files


def is_complete(folder: Path, *, part: bool = False) -> bool:
    """True if config and all weight files are there; what they contain is not checked.

    With ``part``, weight files may be missing whose headers are there.
    """
    if not (folder / "config.json").is_file():
        return False
    try:
        names = [*names_in(folder), *(absent_files(folder) if part else ())]
        return bool(choose_weight_files(names, read_index(folder), str(folder)).names)
    except K2Error:
        return False
