"""Command ``k2 models verify``: compare the files of a model with their digests."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from k2cli.commands.models.path import ModelArgument
from k2cli.commands.options import AsJson

if TYPE_CHECKING:
    from k2cli.models.inventory.verify import Verification


def verify(model: ModelArgument, json: AsJson = False) -> None:
    """Verify the files of a model on this machine, and name those that are damaged.

    Files in the cache of the Hub are compared with their sha256 or git sha1. For other folders no
    digests are known: there only headers, lengths and the index are checked.

    Example: k2 models verify demo
    """
    from k2cli.errors import K2Error
    from k2cli.models.inventory.verified import note_verified
    from k2cli.models.inventory.verify import verify_folder
    from k2cli.models.reference import local_checkpoint
    from k2cli.ui.output import print_json, print_line
    from k2cli.ui.progress import ByteProgress

    folder = local_checkpoint(model)
    with ByteProgress() as progress:
        progress.step(f"verifying {folder}")
        found = verify_folder(folder, progress.advance)
    verified = [file.name for file in found.files if file.status == "verified"]
    note_verified(folder, verified, "verify")
    if json:
        print_json(_document(model, found))
    else:
        for line in _lines(model, found):
            print_line(line)
    if found.damaged or found.problems:
        count = len(found.damaged) or len(found.problems)
        what = "damaged files" if found.damaged else "problems"
        raise K2Error(f"'{model}' has {count} {what}", _hint(model, found))


def _hint(model: str, found: Verification) -> str:
    """Return the commands that fetch damaged files again.

    A download takes a file of the right size for whole, so damaged data are removed first.
    """
    from k2cli.models.inventory.verify import expected_digest

    paths = [found.folder / file.name for file in found.damaged]
    if not paths or not all(expected_digest(path) for path in paths):
        return "copy the named files again from where the folder came from"
    data = " ".join(shlex.quote(str(path.resolve())) for path in paths)
    return f"rm -f {data} && k2 download {shlex.quote(model)}"


def _document(model: str, found: Verification) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": model,
        "path": str(found.folder),
        "files": [
            {"name": f.name, "bytes": f.nbytes, "status": f.status, "reason": f.reason}
            for f in found.files
        ],
        "problems": list(found.problems),
    }


def _lines(model: str, found: Verification) -> list[str]:
    from k2cli.units import format_bytes

    verified = [file for file in found.files if file.status == "verified"]
    unknown = sum(file.status == "no digest known" for file in found.files)
    size = format_bytes(sum(file.nbytes for file in verified))
    lines = [f"{file.name}: {file.reason}" for file in found.damaged] + list(found.problems)
    lines.append(f"{model}: {len(verified)} files verified ({size})")
    if unknown:
        lines.append(f"{unknown} files have no known digest: only headers and lengths were checked")
    return lines
