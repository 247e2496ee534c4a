"""Command ``k2 models verify``: compare the files of a model with their digests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from k2cli.commands.models.path import ModelArgument
from k2cli.commands.options import AsJson

if TYPE_CHECKING:
    from k2cli.errors import K2Error
    from k2cli.models.inventory.find import KnownModel
    from k2cli.models.inventory.verify import Verification


def verify(
    model: ModelArgument,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a repository.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Fetch what is damaged or missing, and nothing else."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Verify the files of a model on this machine, and name those that are damaged or missing.

    Files are compared with the hashes that the download or the push has recorded, without network
    access. For a folder without a record only headers, lengths and the index are checked.

    With --repair, damaged files are fetched at the commit of the record. Each one stays until the
    new one is complete.

    Example: k2 models verify demo
    """
    from k2cli.models.inventory.find import find_model
    from k2cli.models.inventory.verify import verify_folder
    from k2cli.ui.output import print_json, print_line
    from k2cli.ui.progress import ByteProgress

    known = find_model(model, revision)
    with ByteProgress() as progress:
        progress.step(f"verifying {known.folder}")
        found = verify_folder(known.folder, known.record, _Shown(progress).read)
    if repair and found.damaged:
        found = _repair(known, found)
    if json:
        print_json(_document(known, found))
    else:
        for line in _lines(known, found):
            print_line(line)
    if found.damaged or found.problems:
        raise _error(known, found, repaired=repair)


class _Shown:
    """Progress of reading files, with rate and time left."""

    def __init__(self, progress: Any) -> None:
        import time

        self._progress, self._clock = progress, time.monotonic
        self._begun = self._clock()

    def read(self, done_bytes: int, total_bytes: int) -> None:
        """Show the bytes that have been read."""
        seconds = self._clock() - self._begun
        self._progress.transfer(done_bytes, total_bytes, done_bytes, seconds, [], "")


def _repair(known: KnownModel, found: Verification) -> Verification:
    from k2cli.commands.download import show_event
    from k2cli.models.inventory.repair import repair
    from k2cli.ui.output import note
    from k2cli.ui.progress import ByteProgress

    for file in found.damaged:
        note(f"{file.name} {file.reason}")
    try:
        with ByteProgress() as progress:
            return repair(known, found, lambda event: show_event(event, progress))
    except KeyboardInterrupt:
        note(f"\ninterrupted; to continue: {known.command('models verify', '--repair')}")
        raise


def _error(known: KnownModel, found: Verification, *, repaired: bool) -> K2Error:
    from k2cli.errors import K2Error
    from k2cli.models.inventory.repair import cannot_repair

    if not found.damaged:
        count = len(found.problems)
        text = f"'{known.text}' has {count} problem{'s' if count > 1 else ''}"
        if repaired:
            return K2Error(text, "its files are what their source has: ask there")
        return K2Error(text, None if known.record is None else known.command("download"))
    count = len(found.damaged)
    what = "damaged or missing file" + ("s" if count > 1 else "")
    without_source = cannot_repair(known, found)
    hint = without_source.hint if without_source else known.command("models verify", "--repair")
    return K2Error(f"'{known.text}' has {count} {what}", hint)


def _document(known: KnownModel, found: Verification) -> dict[str, Any]:
    record = known.record
    return {
        "schema_version": 1,
        "model": known.text,
        "path": str(found.folder),
        "commit": record.commit if record is not None and record.commit else None,
        "files": [
            {"name": f.name, "bytes": f.nbytes, "status": f.status, "reason": f.reason}
            for f in found.files
        ],
        "problems": list(found.problems),
    }


def _lines(known: KnownModel, found: Verification) -> list[str]:
    from k2cli.units import format_bytes

    right = [file for file in found.files if file.status in ("verified", "repaired")]
    repaired = [file for file in right if file.status == "repaired"]
    unknown = sum(file.status == "no digest known" for file in found.files)
    size = format_bytes(sum(file.nbytes for file in right))
    lines = [f"{file.name} {file.reason}" for file in found.damaged] + list(found.problems)
    lines += [f"{file.name} is repaired" for file in repaired]
    lines.append(f"{known.text}: {len(right)} files verified ({size})")
    if unknown:
        lines.append(f"{unknown} files have no known digest: only headers and lengths were checked")
    return lines
