"""Models in folders outside the Hub's cache: k2's own conversions, and folders that k2 knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import matching
from k2cli.models.catalog import WheelSource, catalog
from k2cli.models.inventory.contents import contents_of, describe_config
from k2cli.models.inventory.hub_cache import INCOMING_LOCK, Leftover, leftover
from k2cli.models.inventory.known_folders import known_folder, known_folders, may_remove
from k2cli.models.inventory.stored_model import Kind, StoredModel
from k2cli.models.inventory.verified import is_read, last_verified
from k2cli.models.inventory.writers import is_held, writer_of_folder
from k2cli.models.json_files import read_json_if_present
from k2cli.models.part import FOLDER
from k2cli.models.reference import MODELSCOPE, SOURCE_NAME, modelscope_folder
from k2cli.models.sources.snapshot_record import recorded_snapshot
from k2cli.settings import data_directory, models_directory

_SUBFOLDERS = ("additional_chat_templates", FOLDER)
_NOT_K2S = "k2 removes only files that it wrote, and it did not write this folder"


def conversion_lock() -> Path:
    """Return the lock that a download of an alias and a conversion hold."""
    return data_directory() / "downloads" / ".lock"


def folder_models(used_folders: Collection[str] = ()) -> list[StoredModel]:
    """Describe the converted models, and the folders that k2 knows.

    Args:
        used_folders: folders of models that runs were launched with.
    """
    converted = list(_converted())
    base = os.path.realpath(models_directory())
    known = {os.path.realpath(each.path): each.path for each in known_folders()}
    known |= {os.path.realpath(path): path for path in used_folders if Path(path).is_absolute()}
    for place, path in sorted(known.items()):
        in_cache = Path(place).parent.name == "snapshots"
        if Path(place).is_relative_to(base) or in_cache or not Path(place).is_dir():
            continue
        converted += _if_it_stays(Path(path), _of_user)
    return converted


def _of_user(folder: Path) -> StoredModel:
    return described_folder(folder, "folder", shown_path(folder))


def _converted() -> Iterator[StoredModel]:
    for folder in matching(models_directory(), "[!.]*"):
        if folder.is_dir():
            yield from _if_it_stays(folder, _of_k2)


def _if_it_stays(
    folder: Path, describe: Callable[[Path], StoredModel]
) -> tuple[StoredModel] | tuple[()]:
    """Describe a folder, unless another command removes it meanwhile.

    Raises:
        OSError: if it cannot be read.
    """
    try:
        return (describe(folder),)
    except FileNotFoundError:
        if folder.exists():
            raise
        return ()


def _of_k2(folder: Path) -> StoredModel:
    """Describe a folder in k2's own."""
    entry = catalog().get(folder.name)
    if entry is not None and isinstance(entry.source, WheelSource):
        gguf = wheel_file(folder.name)
        made_from = str(gguf) if gguf is not None else ""
        return described_folder(folder, "converted", folder.name, gguf, made_from)
    if name := _modelscope_name(folder):
        return described_folder(folder, "converted", name)
    source = _source_path(folder)
    there = source is not None and source.is_file()
    name = shown_path(source if there and source is not None else folder)
    return described_folder(folder, "converted", name, source=str(source or ""))


def _modelscope_name(folder: Path) -> str:
    """Return what a user types for the folder of a model of ModelScope; "" for another folder."""
    record = recorded_snapshot(folder)
    if record is None or record.source != "modelscope":
        return ""
    for revision in (None, record.revision, record.commit):
        if modelscope_folder(record.repo, revision).name == folder.name:
            return f"{MODELSCOPE}{record.repo}" + (f"@{revision}" if revision else "")
    return ""


def is_k2s(folder: Path) -> bool:
    """True for a folder in k2's own folder that k2 made: all of it is removed with the model."""
    if os.path.realpath(folder.parent) != os.path.realpath(models_directory()):
        return False
    entry = catalog().get(folder.name)
    is_alias = entry is not None and isinstance(entry.source, WheelSource)
    record = recorded_snapshot(folder)
    fetched = record is not None and record.written_by == "k2"
    if is_alias or fetched or (folder / SOURCE_NAME).is_file():
        return True
    # What an interrupted push or removal has left.
    return folder.name.startswith("modelscope--") or not {*os.listdir(folder)} - {INCOMING_LOCK}


def wheel_file(alias: str) -> Path | None:
    """Return the GGUF file that k2 keeps after converting an alias; None if there is none."""
    entry = catalog().get(alias)
    if entry is None or not isinstance(entry.source, WheelSource):
        return None
    path = data_directory() / "downloads" / Path(entry.source.member).name
    return path if path.is_file() and not path.is_symlink() else None


def _source_path(folder: Path) -> Path | None:
    """Return the user's GGUF file that a folder was converted from."""
    with suppress(K2Error):
        path = read_json_if_present(folder / SOURCE_NAME).get("path")
        if isinstance(path, str) and Path(path).is_absolute():
            return Path(path)
    return None


def shown_path(path: Path) -> str:
    """Return a path as a user types it, with ``~`` for the home folder."""
    home = os.path.expanduser("~")
    if home not in ("~", "/") and path.is_relative_to(home) and path != Path(home):
        return f"~/{path.relative_to(home)}"
    return str(path)


def described_folder(
    folder: Path, kind: Kind, name: str, extra: Path | None = None, source: str = ""
) -> StoredModel:
    """Describe the model in a folder.

    Args:
        extra: a file elsewhere that belongs to it.
    """
    files, leftovers = _files_of(folder)
    record = recorded_snapshot(folder)
    partial = {each.path.name[1:].rpartition(".")[0]: each.nbytes for each in leftovers}
    present = {path.relative_to(folder).as_posix(): _size(path) for path in files}
    broken = sum(not path.exists() for path in files)
    contents = contents_of(folder, present, broken, record, partial)
    about = describe_config(folder)
    known = known_folder(folder)
    total = sum(present.values()) + sum(each.nbytes for each in leftovers)
    total += _size(extra) if extra is not None else 0
    read = [each for each in present if is_read(each) and (folder / each).exists()]
    writer = writer_of_folder(folder)
    if kind == "converted" and not writer and contents.state != "complete":
        writer = "download" if is_held(conversion_lock()) else ""
    return StoredModel(
        name=name,
        kind=kind,
        folder=str(folder),
        state=contents.state,
        bytes=total,
        added_bytes=total,
        own_bytes=total,
        missing_bytes=contents.missing_bytes,
        repo=record.repo if record is not None else "",
        commit=record.commit if record is not None else "",
        format=about.format,
        architecture=about.architecture,
        quantization=about.quantization,
        source=known.source if known is not None else source,
        writer=writer if contents.state != "complete" else "",
        verified=last_verified(folder, read) if contents.state in ("complete", "part") else None,
        kept_because="" if is_k2s(folder) or may_remove(folder) else _NOT_K2S,
        files=contents.files,
    )


def _files_of(folder: Path) -> tuple[list[Path], list[Leftover]]:
    """Return the files of a model's folder and what interrupted transfers left there.

    Other folders in it are the user's, and not looked at.
    """
    files, leftovers = [], []
    places = [folder, *(folder / name for name in _SUBFOLDERS)]
    for place in places:
        if place.is_dir() and (place == folder or not place.is_symlink()):
            for path in sorted(place.iterdir()):
                left = leftover(path) if path.name.startswith(".") else None
                if left is not None:
                    leftovers.append(left)
                elif not path.is_dir() and not (place == folder and path.name.startswith(".")):
                    files.append(path)
    downloads = folder / ".cache" / "huggingface" / "download"
    for path in sorted(downloads.iterdir()) if downloads.is_dir() else ():
        if (left := leftover(path)) is not None:
            leftovers.append(left)
    return files, leftovers


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
