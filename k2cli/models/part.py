"""A part of a checkpoint: a folder that lacks weight files which its machine does not need.

The headers of the files that are not there, and their sizes, are in the folder ``.k2-part``. So the
checkpoint can be read, planned and compared like a whole one, while no file in the model's own
folder ever has another content than its name says. Other programs see an incomplete model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_json, encode_json, read_regular, write_atomically

FOLDER = ".k2-part"
"""Name of the folder within the model's folder."""

_LIST = "files.json"
_LIMIT_BYTES = 16 * 2**20


class _PartList(msgspec.Struct, frozen=True):
    """Sizes of the absent weight files, by name."""

    sizes: dict[str, int]
    schema_version: int = 1


def absent_files(folder: Path) -> dict[str, int]:
    """Return the sizes of the weight files that this part of a checkpoint lacks, by name.

    Empty for a whole checkpoint.

    Raises:
        K2Error: if the list is damaged.
    """
    path = folder / FOLDER / _LIST
    try:
        listed = decode_json(read_regular(path, _LIMIT_BYTES), type=_PartList)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise K2Error(f"{path} is damaged: {error}", "push the model to this machine again") from (
            error
        )
    named = [name for name in listed.sizes if Path(name).name != name or name.startswith(".")]
    if named or any(size < 8 for size in listed.sizes.values()):
        raise K2Error(f"{path} is damaged", "push the model to this machine again")
    return {name: size for name, size in listed.sizes.items() if not os.path.lexists(folder / name)}


def header_path(folder: Path, name: str) -> Path:
    """Return the path of the header of an absent file."""
    return folder / FOLDER / name


def write_part_list(folder: Path, sizes: Mapping[str, int]) -> None:
    """Record which weight files a part of a checkpoint lacks.

    Raises:
        OSError: if it cannot be written.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    write_atomically(folder / FOLDER / _LIST, encode_json(_PartList(dict(sizes))))
