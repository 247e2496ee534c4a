"""Printed summary and JSON document of a download, and the options of its transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def transfer_options(limit_rate: str | None) -> Any:
    """Read the value of ``--limit-rate``.

    Raises:
        UsageError: if it is no number of bytes per second, or too small.
    """
    from k2cli.errors import UsageError
    from k2cli.models.sources.range_stream import DownloadOptions
    from k2cli.units import parse_bytes

    if limit_rate is None:
        return DownloadOptions()
    hint = "--limit-rate 50M"
    try:
        rate = parse_bytes(limit_rate.removesuffix("/s"))
    except UsageError as error:
        raise UsageError(f"--limit-rate {error}", hint) from None
    if rate < 1000:
        raise UsageError(f"--limit-rate '{limit_rate}' is below 1 kB per second", hint)
    return DownloadOptions(bytes_per_second=rate)


def download_document(fetched: Any) -> dict[str, Any]:
    """Return the result of a download as a document."""
    return {
        "schema_version": 1,
        "model": fetched.model,
        "path": None if fetched.path is None else str(fetched.path),
        "commit": fetched.commit,
        "stored_bytes": fetched.stored_bytes,
        "missing_bytes": fetched.missing_bytes,
        "files": [
            {"name": file.name, "bytes": file.nbytes, "missing_bytes": file.missing_bytes}
            for file in fetched.files
        ],
        "was_there": fetched.was_there,
    }


def download_summary(fetched: Any, dry_run: bool, *, chosen: bool) -> list[str]:
    """Return what to print; ``chosen`` if the user chose among the files."""
    from k2cli.units import format_bytes

    size = format_bytes(fetched.stored_bytes)
    if dry_run and not fetched.was_there:
        missing = [file for file in fetched.files if file.missing_bytes]
        lines = [f"  {file.missing_bytes:>17,}  {file.name}" for file in missing]
        target = f" into {fetched.path}" if fetched.path is not None else ""
        what = f"{fetched.model}, {size} of weights" if fetched.stored_bytes else fetched.model
        here = sum(file.nbytes for file in fetched.files) - fetched.missing_bytes
        count = f"{len(missing)} file{'s' if len(missing) != 1 else ''}"
        return [
            f"would download {what}{target}:",
            *lines,
            f"  {fetched.missing_bytes:>17,}  bytes in {count}",
            *([f"  {here:>17,}  bytes are here already"] if here else []),
            *_room(fetched.path, fetched.missing_bytes),
        ]
    state = "already " if fetched.was_there else ""
    if chosen:
        number = len(fetched.files)
        total = format_bytes(sum(file.nbytes for file in fetched.files))
        files = "1 chosen file is" if number == 1 else f"the {number} chosen files are"
        return [f"{fetched.model}: {files} {state}in {fetched.path} ({total})"]
    return [f"{fetched.model} is {state}at {fetched.path} ({size} of weights)"]


def _room(folder: Path | None, needed_bytes: int) -> list[str]:
    """Say how much is free on the volume of a folder, and whether that is enough."""
    from k2cli.system.disk import disk_use
    from k2cli.units import format_bytes

    if folder is None:
        return []
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = disk_use(existing).free
    except OSError:
        return []
    lack = "" if free >= needed_bytes else f", {format_bytes(needed_bytes - free)} too few"
    return [f"  {free:>17,}  bytes are free there{lack}"]
